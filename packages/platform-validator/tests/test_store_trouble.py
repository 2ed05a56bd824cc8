"""The journal's trouble, as it is shown: until a write succeeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from platform_protocol.ids import VmName
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.specimens import cvm
from platform_validator.store.sqlite import SqliteStore
from platform_validator.store.trouble import StoreTrouble


@pytest.mark.robustness(6, "health")
async def test_a_full_database_is_shown_until_something_is_written(tmp_path: Path) -> None:
    """Robustness 6: reading meanwhile is no sign that it can be written."""
    large = replace(cvm(), name=VmName("pv-large"), compose=b"x" * 100_000, host_port=10_002)
    store = await SqliteStore.open(tmp_path / "validator.db")
    try:
        await store.intend_vm(cvm())
        assert store.trouble.now is None
        [pages] = store._db.connection.execute("PRAGMA page_count").fetchone()
        store._db.connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreUnavailable):
            await store.intend_vm(large)
        assert [record.name for record in await store.open_vms()] == [cvm().name]
        assert "full" in str(store.trouble.now)
        store._db.connection.execute("PRAGMA max_page_count = 100000")
        await store.intend_vm(large)
        assert store.trouble.now is None
    finally:
        await store.close()


def test_what_is_not_tried_again_is_forgotten() -> None:
    """After a minute without another failure."""
    at = [0.0]
    trouble = StoreTrouble(lambda: at[0])
    trouble.failed("full")
    at[0] = 50.0
    trouble.failed("still full")
    at[0] = 100.0
    assert trouble.now == "still full"
    at[0] = 111.0
    assert trouble.now is None
