"""The database: opened, migrated, and used in transactions."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

_MIGRATIONS = Path(__file__).with_name("migrations")
_BUSY_MS = 15_000
_WRITES = "platform_api_writes"
_MIGRATING = 0x706C6174
"""Advisory lock: of several replicas that start at once, one migrates and the others wait."""


class Database:
    """One engine. SQLite runs in WAL mode, and every writing transaction takes the write lock at once."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._writing = engine.execution_options(**{_WRITES: True})

    @classmethod
    async def open(cls, url: str) -> Database:
        """Open and migrate. A new SQLite file is 0600.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: It cannot be opened or migrated.
        """
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
            os.close(os.open(str(parsed.database), os.O_RDWR | os.O_CREAT, 0o600))
        sqlite = parsed.get_backend_name() == "sqlite"
        # Parameters hold lease tokens, and the errors that quote them are logged.
        engine = create_async_engine(url, pool_pre_ping=not sqlite, hide_parameters=True)
        if sqlite:
            _prepare_sqlite(engine)
        database = cls(engine)
        try:
            async with database.write() as connection:
                await connection.run_sync(_migrate)
        except BaseException:
            await engine.dispose()
            raise
        return database

    async def close(self) -> None:
        """Close connections."""
        await self._engine.dispose()

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is committed at the end, or rolled back."""
        async with self._writing.begin() as connection:
            yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction for reading; it holds up no writer."""
        async with self._engine.connect() as connection:
            yield connection


def _prepare_sqlite(engine: AsyncEngine) -> None:
    @sa.event.listens_for(engine.sync_engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            f"busy_timeout = {_BUSY_MS}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begun(connection: sa.Connection) -> None:
        # A reader that later writes would fail with SQLITE_BUSY_SNAPSHOT, so who writes locks first.
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: sa.Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
