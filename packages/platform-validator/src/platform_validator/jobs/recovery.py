"""What becomes, at start, of the jobs and CVMs that an earlier process left behind.

Decided purely (`left_behind`). What needs only the journal is done at once, in order; what needs the
Platform API or a CVM (adopting, releasing) is handed to the job loop, which begins with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol

import structlog

from platform_protocol.ids import VmName
from platform_validator.clock import Clock
from platform_validator.store.port import Store
from platform_validator.store.records import JobOutcome, JobRecord, Stage, VmPhase, VmRecord

RESTARTED = "validator_restarted"
ADOPTABLE_FOR = timedelta(minutes=2)

_log = structlog.get_logger(__name__)


class Reclaimer(Protocol):
    """Destroys CVMs that nobody holds, without waiting."""

    def reclaim(self, name: VmName, *, where: str) -> None:
        """Have it destroyed. `where` it was found is counted."""


class Fate(StrEnum):
    """What becomes of an open job."""

    SUBMIT = "submit"
    FINISH = "finish"
    ADOPT = "adopt"
    RELEASE = "release"
    FORGET = "forget"


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What an earlier process left: jobs to go on with, each with its CVM, and jobs to give back.

    `fates` counts all open jobs by what becomes of them; `destroying` CVMs that no job goes on in.
    """

    adopt: tuple[tuple[JobRecord, VmRecord], ...] = ()
    release: tuple[JobRecord, ...] = ()
    fates: Mapping[str, int] = field(default_factory=dict)
    destroying: int = 0


def left_behind(job: JobRecord, vm: VmRecord | None, *, in_outbox: bool, now: datetime) -> Fate:
    """What becomes of an open job. `vm` is its CVM, where the journal holds one that is not gone."""
    # 1. A stored result is submitted as it is.
    if in_outbox:
        return Fate.SUBMIT
    # 2. Its result was acknowledged; only the last note is missing.
    if job.stage is Stage.SUBMITTED:
        return Fate.FINISH
    # 3. A claim whose answer never came: if it was granted, its lease lapses.
    if job.token is None:
        return Fate.FORGET
    # 4. It runs, in a CVM that was good and has time left: the session is resumed.
    if (
        job.kit is not None
        and vm is not None
        and vm.phase is VmPhase.READY
        and vm.attestation is not None
        and now + ADOPTABLE_FOR < vm.hard_deadline
    ):
        return Fate.ADOPT
    # 5. Granted, and not that far: given back, never run again on our own authority.
    return Fate.RELEASE


async def recover(*, store: Store, fleet: Reclaimer, clock: Clock) -> Inheritance:
    """Bring the journal in order and have the CVMs destroyed that no job goes on in. May be repeated.

    Raises:
        StoreUnavailable: The journal cannot be read or written.
    """
    undelivered = {entry.claim_id for entry in await store.outbox()}
    vms = {record.name: record for record in await store.open_vms()}
    adopt: list[tuple[JobRecord, VmRecord]] = []
    release: list[JobRecord] = []
    counts = dict.fromkeys(Fate, 0)
    for job in await store.open_jobs():
        vm = vms.get(job.vm) if job.vm is not None else None
        fate = left_behind(job, vm, in_outbox=job.claim_id in undelivered, now=clock.now())
        counts[fate] += 1
        match fate:
            case Fate.FINISH:
                outcome = job.outcome or JobOutcome.SUCCEEDED
                await store.end_job(job.claim_id, outcome=outcome, reason=None, at=clock.now())
            case Fate.FORGET:
                await store.end_job(
                    job.claim_id, outcome=JobOutcome.CANCELLED, reason="claim_unanswered", at=clock.now()
                )
            case Fate.ADOPT if vm is not None:
                adopt.append((job, vm))
            case Fate.RELEASE:
                release.append(job)
    kept = {vm.name for _, vm in adopt}
    doomed = [name for name in vms if name not in kept]
    for name in doomed:
        fleet.reclaim(name, where="start")
    _log.info(
        "recovered",
        **{fate.value: count for fate, count in counts.items()},
        cvms_destroying=len(doomed),
    )
    return Inheritance(
        adopt=tuple(adopt),
        release=tuple(release),
        fates={fate.value: count for fate, count in counts.items()},
        destroying=len(doomed),
    )
