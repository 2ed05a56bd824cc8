"""A start on the journal of a year: open it, hold what its CVMs hold, recover; then claim, then compact.

The year is one job and one CVM, written through the Store from claim to end, then copied in SQL. The start
reads from the disk, not from the page cache. Beside it, in the same run: SQLite reading the whole file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from platform_protocol.ids import Hotkey, LeaseToken, VmId
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.clock import SystemClock
from platform_validator.cvm.fleet import Fleet, FleetRules
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import Hosts, VmmHost
from platform_validator.cvm.memory import MemoryVmm
from platform_validator.cvm.probe import HttpProbe
from platform_validator.cvm.quota import Limits, Quota
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.jobs.recovery import recover
from platform_validator.keyring import Keyring
from platform_validator.store.records import JobOutcome, Stage, VmPhase
from platform_validator.store.specimens import NOW, cvm, job
from platform_validator.store.sqlite import SqliteStore
from platform_validator.values import ValueKeeper
from platform_validator.values.keys import MemoryKeys

_GRANTED, _KIT, _COMPOSE, _BODY = (b"x" * size for size in (1024, 2048, 3072, 20_000))
_OPEN, _UNDELIVERED = 8, 20
_YEAR_S = 365 * 24 * 3600
_KEPT_FOR, _KEPT_JOBS = timedelta(days=30), 10_000  # as the daemon keeps house
_LIMITS = Limits(Resources(cpu_cores=64, memory_mb=65_536, disk_mb=1_048_576), max_cvms=64)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500_000)
    jobs: int = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(measure(Path(folder) / "validator.db", jobs))
    for name, value in report.items():
        print(f"{name:<28}{value:>14}")
    print(json.dumps(report))


async def measure(path: Path, jobs: int) -> dict[str, float]:
    """Fill a journal and start on it; seconds, but for what names another unit."""
    report: dict[str, float] = {"jobs": jobs}
    with _timed(report, "filling_s"):
        await fill(path, jobs)
    report["size_mb"] = round(path.stat().st_size / 1e6, 1)
    forget_cache(path)
    with _timed(report, "opening_s"):
        store = await SqliteStore.open(path)
    with _timed(report, "recovery_s"):
        await restart(store)
    report["start_s"] = round(report["opening_s"] + report["recovery_s"], 3)
    with _timed(report, "claim_s"):
        await store.open_claim(job(-1))
        await store.claim_granted(
            job(-1).claim_id, granted=_GRANTED, attempt=1, token=LeaseToken("t"), at=NOW
        )
    with _timed(report, "compaction_s"):
        now = NOW + timedelta(seconds=_YEAR_S)
        report["compacted_rows"] = await store.compact(ended_before=now - _KEPT_FOR, keep=_KEPT_JOBS)
    await store.close()
    forget_cache(path)
    with _timed(report, "reading_it_whole_s"), closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA quick_check(1)").fetchall()
    return report


async def fill(path: Path, jobs: int) -> None:
    """That many ended jobs with their CVMs, spread over a year; then a few that a kill -9 left."""
    store = await SqliteStore.open(path)
    await _write(store, 0)
    await store.end_job(job(0).claim_id, outcome=JobOutcome.SUCCEEDED, reason=None, at=NOW)
    await store.outbox_delivered(job(0).claim_id, at=NOW)
    await store.vm_phase(cvm(0).name, VmPhase.GONE, at=NOW)
    await store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        _copy(connection, "jobs_journal", ("claim_id", "job_id", "vm"), "ended_at", jobs)
        _copy(connection, "cvms_journal", ("name", "session_id", "claim_id", "vm_instance"), "gone_at", jobs)
        connection.execute("COMMIT")
    store = await SqliteStore.open(path)
    for number in range(_OPEN + _UNDELIVERED):
        await _write(store, -2 - number, deliver_later=number < _UNDELIVERED)
    await store.close()


async def _write(store: SqliteStore, number: int, *, deliver_later: bool = True) -> None:
    """One job as its life writes it, until its result is stored or, else, until it runs."""
    record, vm = job(number), cvm(number)
    claim, name = record.claim_id, vm.name
    await store.open_claim(record)
    await store.claim_granted(claim, granted=_GRANTED, attempt=1, token=LeaseToken("t" * 43), at=NOW)
    await store.intend_vm(replace(vm, host_port=20_000 - number, compose=_COMPOSE))
    await store.vm_created(name, VmId(f"id-{number}"))
    await store.vm_attested(name, attestation="simulated", vm_instance=f"{number:040x}")
    await store.vm_phase(name, VmPhase.READY, at=NOW)
    await store.vm_assigned(name, claim)
    await store.advance(claim, Stage.RUNNING, at=NOW, vm=name, kit=_KIT)
    if deliver_later:
        await store.store_result(claim, JobOutcome.SUCCEEDED, _BODY, at=NOW)


def _copy(connection: sqlite3.Connection, table: str, names: tuple[str, ...], ends: str, jobs: int) -> None:
    """Row 1 of the table, that many times: `names` get a number, `ends` a moment of the year."""
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[1] != "position"]
    moment = f"strftime('%Y-%m-%dT%H:%M:%f000Z', {ends}, (i * {_YEAR_S / jobs}) || ' seconds')"
    shown = [f"{name} || '-' || i" if name in names else moment if name == ends else name for name in columns]
    connection.execute(
        f"INSERT INTO {table} ({', '.join(columns)}) "  # noqa: S608 - our own words
        f"WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {jobs - 1}) "
        f"SELECT {', '.join(shown)} FROM n, {table} WHERE position = 1"
    )


async def restart(store: SqliteStore) -> None:
    """The first steps of the daemon, with the real fleet; its VMM is the one in memory."""
    clock, vmm = SystemClock(), MemoryVmm()
    level = IsolationLevel.CONTAINER
    host = VmmHost(DEFAULT_HOST, vmm, HttpProbe(vmm=vmm, clock=clock), HostPorts(10_000, 30_000))
    fleet = Fleet(
        hosts=Hosts([host], clock=clock),
        store=store,
        keyring=Keyring(b"k" * 32),
        quota=Quota(_LIMITS),
        policy=AttestationPolicy(level=level, allow_simulated=False, checker=None),
        values=ValueKeeper(source=MemoryKeys(), store=store, clock=clock).manager,
        clock=clock,
        identity=await store.identity(),
        validator=Hotkey("5DD"),
        rules=FleetRules(level=level, allow_simulated=False, base_url="http://10.0.2.2:18080"),
    )
    await fleet.restore()
    found = await recover(store=store, fleet=fleet, clock=clock)
    held = len(fleet.views())
    if (found.fates["submit"], found.fates["release"], held) != (_UNDELIVERED, _OPEN, _OPEN + _UNDELIVERED):
        raise AssertionError(f"recovered {found.fates}, {held} CVMs")


def forget_cache(path: Path) -> None:
    """Out of the page cache, as after the host's start."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


@contextmanager
def _timed(report: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    report[name] = round(time.perf_counter() - began, 3)


if __name__ == "__main__":
    main()
