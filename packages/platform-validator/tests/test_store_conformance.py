"""Both stores pass one suite; SQLite's also survives crashes, and refuses what it cannot read."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from platform_validator.store.conformance import CASES, Check
from platform_validator.store.memory import MemoryStore
from platform_validator.store.port import Store, StoreCorrupt, StoreUnavailable
from platform_validator.store.sqlite import SqliteStore


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: Store = MemoryStore() if request.param == "memory" else await SqliteStore.open(tmp_path / "v.db")
    yield made
    await made.close()


@pytest.mark.parametrize("check", CASES, ids=lambda check: check.__name__)
async def test_store_conformance(store: Store, check: Check) -> None:
    await check(store)


async def test_a_closed_store_is_unavailable(store: Store) -> None:
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.open_jobs()


async def test_what_was_stored_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    first = await SqliteStore.open(path)
    identity = await first.identity()
    await first.close()
    again = await SqliteStore.open(path)
    assert await again.identity() == identity
    assert path.stat().st_mode & 0o777 == 0o600
    await again.close()


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from pathlib import Path
from platform_validator.store.specimens import job
from platform_validator.store.sqlite import SqliteStore
async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    for number in range(10**6):
        await store.open_claim(job(number))
        print(number, flush=True)
asyncio.run(main())
"""
    path = tmp_path / "v.db"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        acknowledged = 0
        for line in writer.stdout:
            acknowledged = int(line)
            if acknowledged >= 50:
                writer.send_signal(signal.SIGKILL)
                break
        acknowledged = max([acknowledged, *(int(line) for line in writer.stdout if line.strip().isdigit())])
    connection = sqlite3.connect(path)
    count = connection.execute("SELECT count(*) FROM jobs_journal").fetchone()[0]
    connection.close()
    assert count >= acknowledged + 1


@pytest.mark.parametrize("damage", [b"not a database at all, just some text" * 40, None])
async def test_a_damaged_database_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "v.db"
    if damage is None:
        made = await SqliteStore.open(path)
        await made.close()
        data = bytearray(path.read_bytes())
        data[4096:8192] = b"\xff" * 4096
        path.write_bytes(data)
    else:
        path.write_bytes(damage)
    with pytest.raises(StoreCorrupt, match="backup"):
        await SqliteStore.open(path)


async def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    await (await SqliteStore.open(path)).close()
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO migrations VALUES (9999, 'future', 'x')")
    connection.commit()
    connection.close()
    with pytest.raises(StoreCorrupt, match="newer program"):
        await SqliteStore.open(path)


async def test_a_changed_migration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    await (await SqliteStore.open(path)).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE migrations SET checksum = 'other'")
    connection.commit()
    connection.close()
    with pytest.raises(StoreCorrupt, match="another text"):
        await SqliteStore.open(path)


async def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        await SqliteStore.open(tmp_path / "absent" / "v.db")
