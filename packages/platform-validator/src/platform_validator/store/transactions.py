"""The one thread that touches the database: each piece of work is one transaction, wholly or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from platform_validator.store.opening import open_database
from platform_validator.store.port import DuplicateRecord, StoreUnavailable, UnknownRecord
from platform_validator.store.trouble import StoreTrouble

T = TypeVar("T")


class Transactions:
    """Made by `open`. `run`, `known`, `one` and `all` name a query, and belong inside `do` or `read`."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self.connection = connection
        self._thread = thread
        self._queries = load_queries()
        self._closed = False
        self.trouble = StoreTrouble()

    @classmethod
    async def open(cls, path: Path) -> Transactions:
        """See `open_database`, in a thread of its own."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, open_database, path)
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(connection, thread)

    async def close(self) -> None:
        """Finish what was begun and close. Safe to call twice."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self.connection.close)
            self._thread.shutdown()

    async def do(self, work: Callable[[], T]) -> T:
        """Run `work`, which writes, as one transaction in the thread; shielded: done wholly, or not begun.

        Raises:
            StoreUnavailable: It could not be written; or closed.
            DuplicateRecord: A key was there.
        """
        return await self._in_thread("BEGIN IMMEDIATE", work)

    async def read(self, work: Callable[[], T]) -> T:
        """Run `work`, which only reads: also where nothing can be written, or somebody else writes.

        Raises:
            StoreUnavailable: It could not be read; or closed.
        """
        return await self._in_thread("BEGIN", work)

    async def _in_thread(self, begin: str, work: Callable[[], T]) -> T:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, begin, work)
        return await asyncio.shield(running)

    def _transaction(self, begin: str, work: Callable[[], T]) -> T:
        before = self.connection.total_changes
        try:
            self.connection.execute(begin)
            found = work()
            self.connection.execute("COMMIT")
        except BaseException as error:
            # SQLite itself rolls back when the disk is full (sqlite.org/lang_transaction); where that fails
            # too, nothing is committed, and the next BEGIN says so.
            if self.connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    self.connection.rollback()
            if isinstance(error, sqlite3.IntegrityError):
                raise DuplicateRecord(str(error)) from error
            if isinstance(error, sqlite3.Error):
                self.trouble.failed(str(error))
                raise StoreUnavailable(f"the database cannot be used: {error}") from error
            raise
        if self.connection.total_changes != before:
            self.trouble.passed()
        return found

    def run(self, name: str, /, **values: Any) -> int:
        """How many rows it changed."""
        return self.connection.execute(self._queries[name], values).rowcount

    def known(self, name: str, /, **values: Any) -> None:
        """It must change a row.

        Raises:
            UnknownRecord: It changed none.
        """
        if not self.run(name, **values):
            raise UnknownRecord(f"{name}: no record {values.get('claim_id') or values.get('name')}")

    def one(self, name: str, /, **values: Any) -> sqlite3.Row | None:
        """Its first row."""
        found: sqlite3.Row | None = self.connection.execute(self._queries[name], values).fetchone()
        return found

    def all(self, name: str, /, **values: Any) -> list[sqlite3.Row]:
        """Every row of it."""
        return self.connection.execute(self._queries[name], values).fetchall()


def load_queries() -> Mapping[str, str]:
    """Each query of `queries.sql` by its name."""
    text = files("platform_validator.store").joinpath("queries.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (query.strip() for query in parts[2::2]), strict=True))
