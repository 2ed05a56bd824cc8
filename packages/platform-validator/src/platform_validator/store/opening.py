"""Opens the database file: made whole or not at all, and never begun anew by accident."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from platform_validator.store.inspection import inspect
from platform_validator.store.migrate import known_migrations, migrate
from platform_validator.store.port import StoreCorrupt, StoreUnavailable

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_PRIMARY = 0xFF  # an extended result code carries its primary code in the low byte (sqlite.org/rescode)
_WAIT_FOR_LOCK = 10.0
_FULL = 2  # what PRAGMA synchronous answers (sqlite.org/pragma)


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create (0600) and migrate; every commit is synced to disk.

    What is there is read first, and not written before it was found to be good.

    Raises:
        StoreCorrupt: Damaged, emptied, without its main file, not a journal, or from a newer version.
        StoreUnavailable: It cannot be opened or written.
    """
    try:
        if not path.exists():
            _create(path)
        elif path.stat().st_size == 0:
            raise StoreCorrupt(
                f"{path} is empty, which ours never is: restore it from a backup, or remove it to begin anew"
            )
        else:
            inspect(path, known_migrations())
        return _connect(path, journal="WAL")
    except sqlite3.Error as error:
        if is_damage(error):
            raise StoreCorrupt(f"{path} is damaged ({error}): restore it from a backup") from error
        raise StoreUnavailable(f"{path} cannot be used: {error}") from error
    except OSError as error:
        raise StoreUnavailable(f"{path} cannot be opened: {error.strerror or error}") from error


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is no database, or a damaged one; a full or read-only disk is not."""
    return getattr(error, "sqlite_errorcode", 0) & _PRIMARY in _DAMAGED


def _create(path: Path) -> None:
    """Under another name, then renamed: a crash in between leaves nothing that looks like a database."""
    if path.with_name(f"{path.name}-wal").exists():
        raise StoreCorrupt(
            f"{path} is missing and its -wal is there: restore both from a backup, or remove {path}-wal"
        )
    scratch = path.with_name(f".{path.name}.new")
    for leftover in (scratch, scratch.with_name(f"{scratch.name}-journal")):
        leftover.unlink(missing_ok=True)
    os.close(os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    _connect(scratch, journal="DELETE").close()
    scratch.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _connect(path: Path, *, journal: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_WAIT_FOR_LOCK)
    try:
        connection.row_factory = sqlite3.Row
        # secure_delete: what was in clear in an older version is overwritten when it is sealed.
        pragmas = (
            f"journal_mode = {journal}",
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",
        )
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}").fetchall()
        if connection.execute("PRAGMA synchronous").fetchone()[0] != _FULL:
            raise StoreUnavailable(f"{path}: this SQLite does not sync each commit")
        migrate(connection, known_migrations())
    except BaseException:
        connection.close()
        raise
    return connection
