"""The database file: never begun anew by accident, private, readable by this version when older."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_protocol.resources import Resources
from platform_validator.store.opening import open_database
from platform_validator.store.port import StoreCorrupt, StoreUnavailable
from platform_validator.store.records import JobRecord, Stage
from platform_validator.store.sqlite import SqliteStore

RECORD = JobRecord(
    ClaimId("claim"),
    JobId("job"),
    ChallengeId("challenge"),
    "key",
    Resources(cpu_cores=1, memory_mb=1, disk_mb=1),
    Stage.PENDING,
    datetime(2026, 1, 1, tzinfo=UTC),
)


def test_an_emptied_database_is_refused(tmp_path: Path) -> None:
    """A truncation to nothing is not taken for a first start."""
    path = tmp_path / "validator.db"
    open_database(path).close()
    path.write_bytes(b"")
    with pytest.raises(StoreCorrupt, match="remove it to begin anew"):
        open_database(path)


async def test_a_truncated_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "validator.db"
    await (await SqliteStore.open(path)).close()
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(StoreCorrupt, match="restore it from a backup"):
        await SqliteStore.open(path)


def test_a_lost_main_file_is_refused(tmp_path: Path) -> None:
    """What its -wal still holds would be written into the new one."""
    path = tmp_path / "validator.db"
    path.with_name("validator.db-wal").write_bytes(b"frames")
    with pytest.raises(StoreCorrupt, match="is missing"):
        open_database(path)


def test_a_creation_that_was_killed_is_begun_anew(tmp_path: Path) -> None:
    """The leftover of one is no database yet, and is in nobody's way."""
    (tmp_path / ".validator.db.new").write_bytes(b"half")
    open_database(tmp_path / "validator.db").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["validator.db"]


@pytest.mark.robustness(1, "starting")
def test_a_first_start_that_was_killed_is_undone_by_the_next(tmp_path: Path) -> None:
    """Robustness 7: half a transaction in the file, and beside it the rollback journal that undoes it."""
    path, left = tmp_path / "validator.db", tmp_path / "left" / "validator.db"
    left.parent.mkdir()
    open_database(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE").fetchall()
        connection.execute("PRAGMA cache_size = 1").fetchall()
        connection.execute("BEGIN")
        for number in range(200):
            connection.execute("INSERT INTO meta VALUES (?, ?)", (str(number), "x" * 1000))
        for suffix in ("", "-journal"):
            shutil.copy(f"{path}{suffix}", f"{left}{suffix}")
        connection.execute("ROLLBACK")
    assert left.stat().st_size > 100_000
    with closing(open_database(left)) as connection:
        assert connection.execute("SELECT count(*) FROM meta").fetchone()[0] == 0


async def test_every_file_of_the_database_is_private(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path / "validator.db")
    await store.open_claim(RECORD)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert "validator.db-wal" in modes
    assert set(modes.values()) == {0o600}
    await store.close()


async def test_a_full_disk_refuses_writes_and_recovers(tmp_path: Path) -> None:
    """Nothing changes while it is full, reads go on, and the same store writes again afterwards."""
    store = await SqliteStore.open(tmp_path / "validator.db")
    connection = store._db.connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    await store.open_claim(RECORD)
    with pytest.raises(StoreUnavailable, match="full"):
        await store.claim_granted(
            RECORD.claim_id,
            granted=bytes(1_000_000),
            attempt=1,
            token=LeaseToken("t"),
            at=RECORD.claimed_at,
        )
    assert await store.job(RECORD.claim_id) == RECORD
    connection.execute("PRAGMA max_page_count = 1000000").fetchall()
    await store.advance(RECORD.claim_id, Stage.RUNNING, at=RECORD.claimed_at)
    found = await store.job(RECORD.claim_id)
    assert found is not None
    assert found.stage is Stage.RUNNING
    await store.close()
