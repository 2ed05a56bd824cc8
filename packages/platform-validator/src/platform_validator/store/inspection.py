"""Looks at a database file before anything writes to it: whole, ours, and of a version that is known."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from platform_validator.store.migrate import Migration, check_versions
from platform_validator.store.port import StoreCorrupt

# The start has two seconds. A cold disk of 500 MB/s gives this in half of one; a journal that is compacted
# holds some ten thousand jobs, and is a third of it.
_READ_WHOLE = 256 * 1024 * 1024
_CHUNK = 1024 * 1024
_HEADER = 100
_HISTORY = {"jobs_journal": "stage <> 'done'", "cvms_journal": "phase <> 'gone'"}


def inspect(path: Path, steps: list[Migration], *, read_whole: int = _READ_WHOLE) -> None:
    """Read it and change nothing. Above `read_whole` bytes, of the two journals only what is open is read.

    Raises:
        StoreCorrupt: Damaged, not a journal, or from a newer version.
        sqlite3.Error: Not a database, damaged, or it cannot be read.
    """
    if _is_there(path, "-journal"):
        # Left by a first start that was killed: only a writer can undo it.
        connection = sqlite3.connect(path, isolation_level=None)
    else:
        _check_length(path)
        # Without a log there is nothing to read beside the file, and no reason to make one.
        how = "mode=ro" if _is_there(path, "-wal") else "immutable=1"
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None)
    try:
        if not check_versions(connection, steps):
            raise StoreCorrupt(f"{path} is a database with nothing in it, which ours never is: wrong file?")
        if path.stat().st_size <= read_whole:
            _read_ahead(path)
            checks = ["PRAGMA quick_check(1)"]
        else:
            checks = list(_checks_of_what_is_open(connection))
        for check in checks:
            if connection.execute(check).fetchone()[0] != "ok":
                raise StoreCorrupt(f"{path} is damaged: restore it from a backup")
    finally:
        connection.close()


def _check_length(path: Path) -> None:
    """SQLite takes what a cut last page lacks for zeros, which in an empty one is no damage that it knows.

    Raises:
        StoreCorrupt: The file is shorter than its header says (sqlite.org/fileformat2.html 1.3).
    """
    if _is_there(path, "-wal"):
        # A checkpoint that was cut short: the rest is in the log.
        return
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if len(header) < _HEADER or header[24:28] != header[92:96]:
        # Too short for one, or written by something that does not count its pages: SQLite judges it.
        return
    page, pages = int.from_bytes(header[16:18]), int.from_bytes(header[28:32])
    if path.stat().st_size < (65_536 if page == 1 else page) * pages:
        raise StoreCorrupt(f"{path} is damaged (cut short): restore it from a backup")


def _is_there(path: Path, suffix: str) -> bool:
    beside = path.with_name(path.name + suffix)
    return beside.exists() and beside.stat().st_size > 0


def _read_ahead(path: Path) -> None:
    """Into the page cache, in order: ten times as fast as in the order in which SQLite asks for pages."""
    chunk = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(chunk):
            pass


def _checks_of_what_is_open(connection: sqlite3.Connection) -> Iterator[str]:
    """Everything but the two journals' past; of those, what recovery will read is read."""
    for table, is_open in _HISTORY.items():
        connection.execute(f"SELECT * FROM {table} WHERE {is_open}").fetchall()  # noqa: S608 - our own words
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    yield from (f"PRAGMA quick_check({name})" for (name,) in names if name not in _HISTORY)
