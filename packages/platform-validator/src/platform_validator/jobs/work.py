"""One claimed job on its way: what it holds, where it is, and how it is shown."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import datetime

from platform_protocol.ids import ChallengeId, ClaimId, JobId, VmName
from platform_protocol.platform_messages import Claim
from platform_validator.challenges.instance import InstanceRef
from platform_validator.challenges.room import Guest
from platform_validator.cvm.quota import Reservation
from platform_validator.jobs.lease import HeldLease
from platform_validator.jobs.logs import LogStream
from platform_validator.store.records import JobOutcome, JobRecord, Stage


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as status, CLI and pages show it. `progress` is the guest's word, 0 to 100."""

    job_id: JobId
    claim_id: ClaimId
    challenge_id: ChallengeId
    stage: Stage
    attempt: int | None
    outcome: JobOutcome | None
    reason: str | None
    vm: VmName | None
    claimed_at: datetime
    ended_at: datetime | None
    progress: float | None = None
    message: str | None = None

    @classmethod
    def of(cls, record: JobRecord) -> JobView:
        """A job of the journal."""
        return cls(
            job_id=record.job_id,
            claim_id=record.claim_id,
            challenge_id=record.challenge_id,
            stage=record.stage,
            attempt=record.attempt,
            outcome=record.outcome,
            reason=record.reason,
            vm=record.vm,
            claimed_at=record.claimed_at,
            ended_at=record.ended_at,
        )


@dataclass(slots=True)
class ClaimedJob:
    """A granted claim and what was set aside for it: either a ready CVM or a reservation.

    `asked_at` is CLOCK_BOOTTIME from before the claim was sent: the lease counts from there.
    """

    claim_id: ClaimId
    claim: Claim
    ref: InstanceRef
    asked_at: float
    claimed_at: datetime
    cvm: Guest | None = None
    reservation: Reservation | None = None
    stage: Stage = Stage.CLAIMED
    stage_since: float = 0.0
    vm: VmName | None = None
    progress: float | None = None
    message: str | None = None
    started: bool = False
    stored: bool = False
    lost: str | None = None
    lease: HeldLease | None = None
    stream: LogStream | None = None
    logs: list[str] = field(default_factory=list)
    journal: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def job_id(self) -> JobId:
        """The job."""
        return self.claim.id

    def view(self) -> JobView:
        """As it is now, ahead of the journal."""
        return JobView(
            job_id=self.claim.id,
            claim_id=self.claim_id,
            challenge_id=self.claim.challenge_id,
            stage=self.stage,
            attempt=self.claim.attempt,
            outcome=None,
            reason=None,
            vm=self.vm,
            claimed_at=self.claimed_at,
            ended_at=None,
            progress=self.progress,
            message=self.message,
        )
