"""Journals of every version of the schema are brought to the newest, with every value in them."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken, VmId, VmName
from platform_protocol.resources import Resources
from platform_validator.host_name import DEFAULT_HOST, HostName
from platform_validator.store.migrate import Migration, known_migrations, migrate
from platform_validator.store.opening import open_database
from platform_validator.store.records import (
    InstanceEvent,
    InstanceRecord,
    InstanceState,
    JobOutcome,
    JobRecord,
    OutboxRecord,
    Purpose,
    Stage,
    StateIdentity,
    ValueRecord,
    ValueUsage,
    VmPhase,
    VmRecord,
)
from platform_validator.store.specimens import writes
from platform_validator.store.sqlite import SqliteStore

GOLDEN = Path(__file__).parent / "data" / "store"
VERSIONS = [step.version for step in known_migrations()]
SIZE = Resources(cpu_cores=1, memory_mb=512, disk_mb=1024)
CHALLENGE = ChallengeId("challenge")
FILLED = ("values_usage",)
"""Tables that their migration fills from what is there."""
COMPUTED = {("values_current", "size"): 6}
"""Columns that their migration computes, and what for the golden rows; others are empty at first."""
Tables = dict[str, list[dict[str, object]]]


def at(second: int) -> datetime:
    """A moment in the golden journals."""
    return datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC) + timedelta(seconds=second - 5)


def golden_of(version: int, folder: Path = GOLDEN) -> Path:
    return folder / f"version-{version:04}.sql"


def rows_of(connection: sqlite3.Connection) -> Tables:
    """Every row of every table."""
    connection.row_factory = sqlite3.Row
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {name: [dict(row) for row in connection.execute(f"SELECT * FROM {name}")] for name in names}


def contents(script: Path) -> tuple[list[str], Tables]:
    """The schema and the rows that a golden file stands for."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(script.read_text(encoding="utf-8"))
        schema = [row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
        return sorted(schema), rows_of(connection)


def restored(version: int, folder: Path) -> Path:
    """A journal of that version, as a file."""
    path = folder / "validator.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(golden_of(version).read_text(encoding="utf-8"))
    return path


@pytest.mark.robustness(7, "older")
def test_every_version_has_its_golden_journal() -> None:
    """Robustness 7: a migration comes with the journal that it leaves behind (data/store/build_golden.py)."""
    assert sorted(path.name for path in GOLDEN.glob("*.sql")) == [golden_of(v).name for v in VERSIONS]


@pytest.mark.robustness(7, "older")
def test_a_golden_journal_has_rows_in_every_table() -> None:
    """Robustness 7: no table is left out of what the other tests read back."""
    for version in VERSIONS:
        _, tables = contents(golden_of(version))
        assert [name for name, rows in tables.items() if not rows] == []


def test_shipped_migrations_are_never_edited() -> None:
    """Robustness 7: a released migration is final, a change is a new one; here are their checksums."""
    released = (GOLDEN.parent / "migrations.txt").read_text().split()
    assert [step.checksum for step in known_migrations()] == released
    assert [step.version for step in known_migrations()] == list(range(1, len(released) + 1))


def test_golden_journals_are_what_their_script_builds(tmp_path: Path) -> None:
    """Robustness 7: they can be made again, schema and rows the same."""
    subprocess.run(
        [sys.executable, str(GOLDEN / "build_golden.py"), "--into", str(tmp_path)], check=True, timeout=50
    )
    for version in VERSIONS:
        assert contents(golden_of(version, tmp_path)) == contents(golden_of(version))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.robustness(7, "older")
def test_an_older_journal_gets_the_newest_schema_and_keeps_every_value(version: int, tmp_path: Path) -> None:
    """Robustness 7: column by column; what came later is empty or computed; opened again, nothing changes."""
    path = restored(version, tmp_path)
    newest_schema, newest = contents(golden_of(VERSIONS[-1]))
    _, before = contents(golden_of(version))
    open_database(path).close()
    with closing(sqlite3.connect(path)) as connection:
        found = rows_of(connection)
        schema = sorted(
            row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
        )
    assert {name: list(rows[0]) for name, rows in found.items() if rows} == {
        name: list(rows[0]) for name, rows in newest.items() if name in before or name in FILLED
    }
    assert [found[name] for name in FILLED] == [newest[name] for name in FILLED]
    assert set(found) - set(before) == set(newest) - set(before)
    assert len(schema) == len(newest_schema)
    assert found.pop("migrations") == newest["migrations"]
    before.pop("migrations")
    for table, rows in before.items():
        for old, new in zip(rows, found[table], strict=True):
            assert {name: new[name] for name in old} == old
            later = new.keys() - old.keys()
            assert {name: new[name] for name in later} == {
                name: COMPUTED.get((table, name)) for name in later
            }
    written = path.read_bytes()
    open_database(path).close()
    assert path.read_bytes() == written


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.robustness(7, "older")
async def test_an_older_journal_is_read_and_written_by_this_version(version: int, tmp_path: Path) -> None:
    """Robustness 7: each record as it was written then; a kit is there from version 2 on."""
    store = await SqliteStore.open(restored(version, tmp_path))
    assert await store.identity() == StateIdentity("0123456789", "00000000-0000-4000-8000-000000000001")
    pending = JobRecord(
        ClaimId("claim-pending"), JobId("job-pending"), CHALLENGE, "key-new", SIZE, Stage.PENDING, at(5)
    )
    submitting = JobRecord(
        claim_id=ClaimId("claim-submitting"),
        job_id=JobId("job-submitting"),
        challenge_id=CHALLENGE,
        instance_key="key-new",
        resources=SIZE,
        stage=Stage.SUBMITTING,
        claimed_at=at(3),
        granted=b'{"attempt":3}\xff\x00',
        attempt=3,
        token=LeaseToken("token-submitting"),
        vm=VmName("pv-destroying"),
        outcome=JobOutcome.SUCCEEDED,
        started_at=at(4),
        kit=b"\x00kit" if version >= 2 else None,
    )
    ended = JobRecord(
        claim_id=ClaimId("claim-ended"),
        job_id=JobId("job-ended"),
        challenge_id=CHALLENGE,
        instance_key="key-old",
        resources=SIZE,
        stage=Stage.DONE,
        claimed_at=at(0),
        granted=b'{"attempt":1}',
        attempt=1,
        token=LeaseToken("token-ended"),
        vm=VmName("pv-gone"),
        outcome=JobOutcome.LEASE_LOST,
        reason="lease_lost",
        started_at=at(1),
        ended_at=at(2),
    )
    assert await store.recent_jobs(10) == [pending, submitting, ended]
    assert await store.open_jobs() == [submitting, pending]
    assert await store.outbox() == [
        OutboxRecord(submitting.claim_id, submitting.job_id, b'{"score":1}\xff\x00', at(6), 7, "no answer")
    ]
    destroying = VmRecord(
        name=VmName("pv-destroying"),
        purpose=Purpose.JOB,
        challenge_id=CHALLENGE,
        instance_key="key-new",
        resources=SIZE,
        phase=VmPhase.DESTROYING,
        sealed_secret=b"\x00sealed-destroying",
        compose=b'{"a":1}',
        host_port=10_002,
        session_id="session-destroying",
        intended_at=at(3),
        hard_deadline=at(9),
        vm_id=VmId("id-destroying"),
        claim_id=submitting.claim_id,
        vm_instance="bb",
        attestation="tdx",
        reason="its job has ended",
        host=HostName("small") if version >= 4 else DEFAULT_HOST,
        os_image='{"trust":"pinned"}' if version >= 7 else None,
    )
    assert await store.open_vms() == [destroying]
    assert [each.name for each in await store.env()] == (["KEY"] if version >= 6 else [])
    assert await store.drained_hosts() == ({HostName("small"): at(3)} if version >= 4 else {})
    gone = await store.vm(VmName("pv-gone"))
    assert gone is not None
    assert (gone.phase, gone.gone_at, gone.purpose) == (VmPhase.GONE, at(3), Purpose.READY)
    assert [instance.state for instance in await store.instances()] == ["Recycling", "Active"]
    assert (await store.instances())[0] == InstanceRecord(
        key="key-old",
        challenge_id=CHALLENGE,
        name="Challenge",
        repository="https://example.org/challenge",
        commit="a" * 40,
        spec_digest="digest-old",
        state=InstanceState.RECYCLING,
        since=at(1),
        reason="superseded",
        bundle_sha256="c" * 64,
        compose_hash="d" * 64,
        superseded_by="key-new",
        failures=2,
    )
    history = await store.challenge_history(CHALLENGE, 10)
    older = InstanceEvent(CHALLENGE, "key-older", "a" * 40, None, None, at(2))
    failed = InstanceEvent(CHALLENGE, "key-old", "a" * 40, InstanceState.FAILED, "no kernel", at(1))
    assert history == ([older, failed] if version >= 3 else [])
    assert await store.values(CHALLENGE) == [
        ValueRecord(CHALLENGE, "ké", "[1]", 4, at(7), key_id=None, size=6)
    ]
    assert await store.values_used() == [ValueUsage(CHALLENGE, 1, 6)]
    repeated = await store.change_value(
        CHALLENGE,
        "ké",
        change=writes("2", "again"),
        request=("session-destroying", "r"),
        at=at(8),
    )
    assert repeated.text == "ok"
    await store.advance(pending.claim_id, Stage.RUNNING, at=at(8), kit=b"new")
    await store.outbox_delivered(submitting.claim_id, at=at(8))
    assert await store.compact(ended_before=at(60), keep=0) == 3
    assert [job.kit for job in await store.recent_jobs(10)] == [b"new"]
    await store.close()


def test_a_step_that_fails_is_not_applied() -> None:
    """Neither its tables nor its record; the steps before it stay."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    good = Migration(1, "0001_good.sql", "CREATE TABLE good (a TEXT);")
    bad = Migration(2, "0002_bad.sql", "CREATE TABLE half (a TEXT); CREATE TABLE half (a TEXT);")
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, [good, bad])
    connection.rollback()
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == {"migrations", "good"}
    mended = Migration(2, "0002_bad.sql", "CREATE TABLE half (a TEXT);")
    assert migrate(connection, [good, mended]) == ["0002_bad.sql"]
    connection.close()
