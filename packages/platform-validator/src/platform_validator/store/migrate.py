"""Brings a database to this version: numbered SQL files, each applied once, each with its checksum."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from dataclasses import dataclass
from importlib.resources import files

from platform_validator.store.port import StoreCorrupt

_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")


@dataclass(frozen=True, slots=True)
class Migration:
    """One step. `checksum` is the SHA-256 (hex) of its text."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """What is remembered of it."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def known_migrations() -> list[Migration]:
    """The shipped steps, in order."""
    found = []
    for entry in files("platform_validator.store").joinpath("migrations").iterdir():
        matched = _NAME.fullmatch(entry.name)
        if matched is not None:
            found.append(Migration(int(matched[1]), entry.name, entry.read_text(encoding="utf-8")))
    return sorted(found, key=lambda step: step.version)


def check_versions(connection: sqlite3.Connection, steps: list[Migration]) -> set[int]:
    """The versions that were applied. Writes nothing.

    Raises:
        StoreCorrupt: From a newer version, with a gap, or a step was applied with other text.
    """
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "migrations" not in tables:
        if tables:
            raise StoreCorrupt("the database is not a validator's journal: wrong file?")
        return set()
    applied = {row[0]: row[1] for row in connection.execute("SELECT version, checksum FROM migrations")}
    newest = steps[-1].version
    if applied and max(applied) > newest:
        raise StoreCorrupt(
            f"the database has version {max(applied)}, this program knows {newest}: install the newer program"
        )
    if sorted(applied) != list(range(1, len(applied) + 1)):
        raise StoreCorrupt("the database lacks a migration: restore it from a backup")
    for step in steps[: len(applied)]:
        if applied[step.version] != step.checksum:
            raise StoreCorrupt(
                f"migration {step.name} was applied with another text: wrong program or database"
            )
    return set(applied)


def migrate(connection: sqlite3.Connection, steps: list[Migration]) -> list[str]:
    """Apply what is missing, each step in one transaction; returns the names of those applied.

    Raises:
        StoreCorrupt: From a newer version, with a gap, or a step was applied with other text.
        sqlite3.Error: It cannot be written; a step that began is not applied.
    """
    applied = check_versions(connection, steps)
    if not applied:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS migrations"
            " (version INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL) STRICT"
        )
    missing = [step for step in steps if step.version not in applied]
    for step in missing:
        _apply(connection, step)
    return [step.name for step in missing]


def _apply(connection: sqlite3.Connection, step: Migration) -> None:
    record = f"INSERT INTO migrations VALUES ({step.version}, '{step.name}', '{step.checksum}');"  # noqa: S608 - our own file's name and hash
    connection.executescript(f"BEGIN IMMEDIATE;\n{step.sql}\n{record}\nCOMMIT;")
