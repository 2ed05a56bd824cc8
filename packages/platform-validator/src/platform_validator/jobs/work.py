"""One claimed job on its way: what it holds, where it is, and how it is shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from platform_protocol.ids import ChallengeId, ClaimId, JobId, VmName
from platform_protocol.platform_messages import Claim
from platform_protocol.spec import ChallengeSpec
from platform_validator.challenges.room import Guest
from platform_validator.cvm.jobs import JobOrder
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Reservation
from platform_validator.jobs.ending import Ending
from platform_validator.jobs.lease import HeldLease
from platform_validator.jobs.left_cvm import LeftCvm
from platform_validator.jobs.logs import LogStream
from platform_validator.store.records import JobOutcome, JobRecord, Stage

MAX_LOG_LINES = 10_000


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
    """A granted claim and what was set aside for it: a ready CVM, a reservation, or a CVM to adopt.

    `asked_at` is CLOCK_BOOTTIME from before the claim was sent: the lease counts from there. `ran` is how
    long it ran under an earlier process, and `adopts` the CVM that it ran in. `shared`: others run in its
    CVM too, which outlives it. `kit` makes what is journaled when it begins to run, given since when
    (CLOCK_BOOTTIME, seconds).
    """

    claim_id: ClaimId
    claim: Claim
    plan: CvmPlan
    spec: ChallengeSpec
    asked_at: float
    claimed_at: datetime
    kit: Callable[[float], bytes] | None = None
    cvm: Guest | None = None
    reservation: Reservation | None = None
    adopts: LeftCvm | None = None
    shared: bool = False
    ran: timedelta = timedelta(0)
    stage: Stage = Stage.CLAIMED
    stage_since: float = 0.0
    vm: VmName | None = None
    progress: float | None = None
    message: str | None = None
    started: bool = False
    stored: bool = False
    ending: Ending | None = None
    stop: Callable[[Ending], None] = lambda _ending: None
    lease: HeldLease | None = None
    stream: LogStream | None = None
    logs: list[str] = field(default_factory=list)
    journal: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def job_id(self) -> JobId:
        """The job."""
        return self.claim.id

    @property
    def time_limit(self) -> timedelta:
        """How long the submission may run: the job's, or the challenge's where that is shorter."""
        asked = timedelta(seconds=self.claim.timeout_s)
        declared = self.spec.execution.timeout_s
        return asked if declared is None else min(asked, timedelta(seconds=declared))

    def order(self) -> JobOrder:
        """What the SDK is told to run."""
        claim = self.claim
        return JobOrder(
            job_id=claim.id,
            attempt=claim.attempt,
            challenge_id=claim.challenge_id,
            job_name=claim.job_name,
            payload=claim.payload,
            submission_sha256=claim.submission.sha256 if claim.submission else None,
            submission_name=claim.submission.filename if claim.submission else None,
        )

    def progressed(self, percent: float, message: str) -> None:
        """The guest says how far it is."""
        self.progress, self.message = percent, message[:500]

    def logged(self, level: str, message: str) -> None:
        """The guest says something."""
        if len(self.logs) >= MAX_LOG_LINES:
            del self.logs[: MAX_LOG_LINES // 10]
        self.logs.append(f"{level}: {message}")
        if self.stream is not None:
            self.stream.add(self.logs[-1])

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
