"""Both stores pass one suite."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from platform_validator.store.conformance import CASES, Check
from platform_validator.store.memory import MemoryStore
from platform_validator.store.port import Store, StoreUnavailable
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


async def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        await SqliteStore.open(tmp_path / "absent" / "v.db")
