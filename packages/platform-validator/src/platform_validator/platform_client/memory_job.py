"""A job as the Platform API in memory holds it: what became of it, and how it is listed and granted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from platform_protocol.ids import ChallengeId, ClaimId, Hotkey, JobId, LeaseToken, SubmissionId
from platform_protocol.platform_messages import (
    Claim,
    Lease,
    PendingJob,
    ReleaseReason,
    ResultBody,
    SubmissionRef,
)
from platform_protocol.resources import Resources

MAX_ATTEMPTS = 10
MAX_SANDBOX_DEATHS = 5
_COUNTED = frozenset({ReleaseReason.INFRA, ReleaseReason.ATTESTATION_UNAVAILABLE})


@dataclass(slots=True)
class MemoryJob:
    """`status`: pending, claimed, completed, failed or cancelled."""

    id: JobId
    challenge_id: ChallengeId
    resources: Resources
    timeout_s: int
    payload: dict[str, Any]
    job_name: str | None
    priority: int
    created_at: datetime
    submission: bytes | None
    status: str = "pending"
    outcome: str | None = None
    attempt: int = 0
    token: LeaseToken | None = None
    holder: tuple[str, ClaimId] | None = None
    expires_at: datetime | None = None
    released: set[LeaseToken] = field(default_factory=set)
    body: bytes | None = None
    result: ResultBody | None = None
    releases: list[ReleaseReason] = field(default_factory=list)
    lapses: int = 0
    log_lines: list[str] = field(default_factory=list)
    _listed: PendingJob | None = field(default=None, init=False, repr=False)

    @property
    def finished(self) -> bool:
        """Whether nothing more can come of it."""
        return self.status in {"completed", "failed", "cancelled"}

    def listed(self) -> PendingJob:
        """As it is listed, which never changes while it waits."""
        if self._listed is None:
            self._listed = PendingJob(
                id=self.id,
                challenge_id=self.challenge_id,
                created_at=self.created_at,
                priority=self.priority,
                resources=self.resources,
                timeout_s=self.timeout_s,
            )
        return self._listed

    def granted(self, token: LeaseToken, term: timedelta) -> Claim:
        """What whoever claims it is told."""
        submission = None
        if self.submission is not None:
            submission = SubmissionRef(
                url=f"/submissions/{self.id}/bundle",
                sha256=hashlib.sha256(self.submission).hexdigest(),
                size=len(self.submission),
                filename="submission.tar",
            )
        return Claim(
            id=self.id,
            challenge_id=self.challenge_id,
            submission_id=SubmissionId(self.id) if submission else None,
            miner_hotkey=Hotkey("miner-1"),
            attempt=self.attempt,
            lease=Lease(token=token, term_s=term.total_seconds()),
            job_name=self.job_name,
            payload=self.payload,
            submission=submission,
            timeout_s=self.timeout_s,
            resources=self.resources,
        )

    def given_back(self) -> None:
        """It waits again; or its attempts are used up, and it has failed."""
        self.status, self.expires_at = "pending", None
        if sum(reason in _COUNTED for reason in self.releases) + self.lapses >= MAX_ATTEMPTS:
            self.status, self.outcome = "failed", "infra_error"
        elif self.releases.count(ReleaseReason.SANDBOX_DIED) >= MAX_SANDBOX_DEATHS:
            self.status, self.outcome = "failed", "sandbox_died"
