"""What is done, before any new work, about the jobs and CVMs that an earlier process left behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import structlog

from platform_protocol.ids import VmName
from platform_protocol.platform_messages import ReleaseReason
from platform_validator.clock import Clock
from platform_validator.platform_client.port import PlatformClient, PlatformError
from platform_validator.store.port import Store
from platform_validator.store.records import JobOutcome, JobRecord, Stage

RESTARTED = "validator_restarted"

_log = structlog.get_logger(__name__)


class Destroyer(Protocol):
    """Destroys CVMs by name, without waiting."""

    def destroy(self, name: VmName) -> None:
        """Have it destroyed."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found: results to be submitted, jobs released, claims forgotten, CVMs being destroyed."""

    to_submit: int
    finished: int
    released: int
    forgotten: int
    destroying: int


def left_behind(job: JobRecord, *, in_outbox: bool) -> str:
    """What becomes of an open job: `submit`, `finish`, `release` or `forget`. Pure."""
    # 1. A stored result is submitted as it is.
    if in_outbox:
        return "submit"
    # 2. Its result was acknowledged; only the last note is missing.
    if job.stage is Stage.SUBMITTED:
        return "finish"
    # 3. Granted and without a result: given back, never run again on our own authority.
    if job.token is not None:
        return "release"
    # 4. A claim whose answer never came: if it was granted, its lease lapses.
    return "forget"


async def recover(*, store: Store, client: PlatformClient, fleet: Destroyer, clock: Clock) -> Recovered:
    """Bring the journal in order; a lease that cannot be released lapses.

    Raises:
        StoreUnavailable: The journal cannot be read or written.
    """
    undelivered = {entry.claim_id for entry in await store.outbox()}
    counts = {"submit": 0, "finish": 0, "release": 0, "forget": 0}
    released: list[JobRecord] = []
    for job in await store.open_jobs():
        fate = left_behind(job, in_outbox=job.claim_id in undelivered)
        counts[fate] += 1
        match fate:
            case "finish":
                outcome = job.outcome or JobOutcome.SUCCEEDED
                await store.end_job(job.claim_id, outcome=outcome, reason=None, at=clock.now())
            case "release":
                released.append(job)
            case "forget":
                await store.end_job(
                    job.claim_id, outcome=JobOutcome.CANCELLED, reason="claim_unanswered", at=clock.now()
                )
    open_vms = await store.open_vms()
    for vm in open_vms:
        fleet.destroy(vm.name)
    async with asyncio.TaskGroup() as group:
        for job in released:
            group.create_task(_release(job, store, client, clock))
    found = Recovered(counts["submit"], counts["finish"], counts["release"], counts["forget"], len(open_vms))
    _log.info("recovered", **{name: getattr(found, name) for name in Recovered.__slots__})
    return found


async def _release(job: JobRecord, store: Store, client: PlatformClient, clock: Clock) -> None:
    if job.token is not None:
        try:
            await client.release(job.job_id, job.token, ReleaseReason.INFRA)
        except PlatformError as error:
            _log.warning("not_released", job_id=job.job_id, error=str(error))
    await store.end_job(job.claim_id, outcome=JobOutcome.INFRA_ERROR, reason=RESTARTED, at=clock.now())
