"""Dynamic values: reads and writes a second, durable and sealed, beside bare SQLite that syncs as often."""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

from platform_protocol.ids import ChallengeId
from platform_validator.clock import SystemClock
from platform_validator.store.sqlite import SqliteStore
from platform_validator.values import ValueKeeper
from platform_validator.values.keys import MemoryKeys

_SCHEMA = "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT"


def bare_writes(path: Path, count: int) -> float:
    """Increments a second of bare SQLite: WAL, one synced transaction each."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute(_SCHEMA)
        connection.execute("INSERT INTO counters VALUES ('n', 0)")
        began = time.perf_counter()
        for _ in range(count):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE counters SET value = value + 1 WHERE name = 'n'")
            connection.execute("COMMIT")
        return count / (time.perf_counter() - began)


async def rate(count: int, act: Callable[[], Awaitable[object]], at_once: int) -> float:
    """Calls a second, so many under way at once."""
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await act()

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())
    return count / (time.perf_counter() - began)


async def measure(folder: Path, count: int) -> list[tuple[str, float]]:
    """Each line of the table, in calls a second."""
    store = await SqliteStore.open(folder / "validator.db")
    keeper = ValueKeeper(source=MemoryKeys(), store=store, clock=SystemClock())
    mine = keeper.manager.for_challenge(ChallengeId("challenge"))
    rows = [
        ("increments, one after the other", await rate(count, lambda: mine.increment("n"), 1)),
        ("increments, 20 at once", await rate(count, lambda: mine.increment("n"), 20)),
        ("reads, one after the other", await rate(count, lambda: mine.get("n"), 1)),
    ]
    if await mine.get("n") != 2 * count:
        raise AssertionError("an increment was lost")
    await store.close()
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_writes(Path(folder) / "bare.db", count)
        rows = asyncio.run(measure(Path(folder), count))
    print(f"{'dynamic values':<40}{'a second':>12}{'ratio':>8}")
    print(f"{'bare SQLite, synced increments':<40}{bare:>12.0f}{1:>8.2f}")
    for name, found in rows:
        print(f"{name:<40}{found:>12.0f}{found / bare:>8.2f}")


if __name__ == "__main__":
    main()
