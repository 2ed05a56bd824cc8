"""Looks at a database file before anything writes to it: whole, ours, and of a version that is known."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from platform_validator.store.migrate import Migration, check_versions
from platform_validator.store.port import StoreCorrupt

# A start takes two seconds at most, and reading half a gigabyte from a slow disk takes one. A journal that is
# compacted stays below it.
_READ_WHOLE = 512 * 1024 * 1024
_HISTORY = {"jobs_journal": "stage <> 'done'", "cvms_journal": "phase <> 'gone'"}


def inspect(path: Path, steps: list[Migration], *, read_whole: int = _READ_WHOLE) -> None:
    """Read it and change nothing. Above `read_whole` bytes, of the two journals only what is open is read.

    Raises:
        StoreCorrupt: Damaged, not a journal, or from a newer version.
        sqlite3.Error: Not a database, damaged, or it cannot be read.
    """
    if _is_there(path, "-journal"):
        # Left by a creation of an older version that was killed: only a writer can undo it.
        connection = sqlite3.connect(path, isolation_level=None)
    else:
        # Without a log there is nothing to read beside the file, and no reason to make one.
        how = "mode=ro" if _is_there(path, "-wal") else "immutable=1"
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None)
    try:
        if not check_versions(connection, steps):
            raise StoreCorrupt(f"{path} is a database with nothing in it, which ours never is: wrong file?")
        _check_pages(connection, read_whole)
    finally:
        connection.close()


def _is_there(path: Path, suffix: str) -> bool:
    beside = path.with_name(path.name + suffix)
    return beside.exists() and beside.stat().st_size > 0


def _check_pages(connection: sqlite3.Connection, read_whole: int) -> None:
    """SQLite's check of every page and record; indices are not compared with their tables."""
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    if (pages - free) * size <= read_whole:
        checks = ["PRAGMA quick_check(1)"]
    else:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        checks = [f"PRAGMA quick_check({name})" for name in names if name not in _HISTORY]
        for table, is_open in _HISTORY.items():
            connection.execute(f"SELECT * FROM {table} WHERE {is_open}").fetchall()  # noqa: S608 - our own words
    for check in checks:
        if connection.execute(check).fetchone()[0] != "ok":
            raise StoreCorrupt("the database is damaged: restore it from a backup")
