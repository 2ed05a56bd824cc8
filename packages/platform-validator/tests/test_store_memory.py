"""The journal's memory does not grow with what went through it."""

from __future__ import annotations

import gc
import resource
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest

from platform_protocol.ids import LeaseToken
from platform_validator.store.records import JobOutcome, Stage, VmPhase
from platform_validator.store.specimens import CHALLENGE, NOW, cvm, job, writes
from platform_validator.store.sqlite import SqliteStore

BLOCKS_GROW = 2000
PROCESS_GROWS = 8 * 1024 * 1024


async def _live(store: SqliteStore, number: int) -> None:
    """One job from its claim to its end, with its CVM and a value."""
    claim, vm = job(number).claim_id, cvm(number).name
    await store.open_claim(job(number))
    await store.claim_granted(claim, granted=b"g" * 1000, attempt=1, token=LeaseToken("t"), at=NOW)
    await store.intend_vm(cvm(number))
    await store.vm_assigned(vm, claim)
    await store.advance(claim, Stage.RUNNING, at=NOW, vm=vm, kit=b"k" * 1000)
    await store.change_value(CHALLENGE, "k", change=writes("1"), request=(f"session-{number}", "r"), at=NOW)
    await store.store_result(claim, JobOutcome.SUCCEEDED, b"x" * 5000, at=NOW)
    [entry] = await store.outbox()
    await store.outbox_delivered(entry.claim_id, at=NOW)
    await store.vm_phase(vm, VmPhase.GONE, at=NOW)
    if number % 500 == 0:
        await store.compact(ended_before=NOW + timedelta(days=1), keep=1000)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow(reason="10,000 jobs, 100,000 transactions")
@pytest.mark.robustness(8, "memory")
async def test_memory_stays_flat_over_10_000_jobs() -> None:
    """Robustness 8: what Python holds, and what the process does; the file stays small too."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "validator.db"
        store = await SqliteStore.open(path)
        for number in range(2000):
            await _live(store, number)
        gc.collect()
        blocks, resident, size = sys.getallocatedblocks(), _resident(), path.stat().st_size
        for number in range(2000, 10_000):
            await _live(store, number)
        gc.collect()
        assert sys.getallocatedblocks() - blocks < BLOCKS_GROW
        assert _resident() - resident < PROCESS_GROWS
        assert path.stat().st_size < 2 * size
        assert len(await store.recent_jobs(10_000)) <= 1500
        await store.close()
