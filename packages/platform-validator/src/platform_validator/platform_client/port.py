"""The Platform API port: what the validator asks of the control plane, and every way it may say no."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_protocol.notifications import ChallengeUpdated, Hello, JobCancelled, NewJob, UnknownNotification
from platform_protocol.platform_messages import (
    ActiveChallenge,
    Claim,
    PendingJob,
    ReleaseReason,
    SubmissionRef,
)
from platform_validator.errors import ValidatorError


class PlatformError(ValidatorError):
    """The Platform API did not do what was asked."""


class PlatformUnavailable(PlatformError):
    """No answer, a 5xx, a 429, or no answer of the Platform API's: nothing is known about the effect."""

    def __init__(self, message: str, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class PlatformRefused(PlatformError):
    """A definite no, with the API's stable word in `code` and the HTTP status."""

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class NotAuthorized(PlatformRefused):
    """401 or 403: key, clock, audience or registration; the message says which and what to do."""


class AlreadyClaimed(PlatformRefused):
    """409 on a claim: somebody else has it. A normal event."""


class JobUnknown(PlatformRefused):
    """404: no such job."""


class LeaseRefused(PlatformRefused):
    """409 on renew, release, logs or results: `lease_lost`, `job_cancelled` or `attempt_expired`."""


class ResultRefused(PlatformRefused):
    """422 on results: the body is not acceptable and never will be."""


class SubmissionUnusable(PlatformError):
    """The submission's bytes are not what the claim names (size, SHA-256), or its URL leaves the API."""


@dataclass(frozen=True, slots=True)
class ActiveList:
    """`/challenges/active`; `changed` is False when the API said 304."""

    challenges: tuple[ActiveChallenge, ...]
    changed: bool


Notification = Hello | NewJob | ChallengeUpdated | JobCancelled | UnknownNotification


class PlatformClient(Protocol):
    """One try a call, with its own deadline; retrying is the caller's (each kind of call has its own rule).

    Raises:
        PlatformUnavailable: From every method.
        NotAuthorized: From every signed method.
    """

    async def health(self) -> None:
        """`GET /health`, unsigned."""

    async def active_challenges(self) -> ActiveList:
        """The active challenges; remembers the ETag."""

    async def pending_jobs(
        self, challenge_ids: Sequence[ChallengeId], limit: int = 100
    ) -> Sequence[PendingJob]:
        """Pending jobs of these challenges, in the API's order. An empty list of ids asks for none."""

    async def claim(self, job_id: JobId, claim_id: ClaimId) -> Claim:
        """Claim it, or get the same lease again for the same claim id.

        Raises:
            AlreadyClaimed: Somebody else's, or finished.
            LeaseRefused: `job_cancelled`.
            JobUnknown: No such job.
        """

    async def renew(self, job_id: JobId, token: LeaseToken) -> timedelta:
        """Renew; returns the term from now.

        Raises:
            LeaseRefused: `lease_lost`, `job_cancelled`, `attempt_expired`.
        """

    async def release(self, job_id: JobId, token: LeaseToken, reason: ReleaseReason) -> None:
        """Give the job back.

        Raises:
            LeaseRefused: `lease_lost`.
        """

    async def send_logs(self, job_id: JobId, token: LeaseToken, seq: int, lines: Sequence[str]) -> None:
        """Send log lines.

        Raises:
            LeaseRefused: The token is dead.
        """

    async def submit_result(self, job_id: JobId, body: bytes) -> None:
        """Send a stored result, byte for byte.

        Raises:
            LeaseRefused: `lease_lost` or `job_cancelled`: final.
            ResultRefused: Final.
            JobUnknown: Final.
        """

    async def fetch_submission(self, submission: SubmissionRef, target: Path) -> None:
        """Download it to `target` (0600), checking size and SHA-256; nothing is left there on failure.

        Raises:
            SubmissionUnusable: Not what the claim names.
            PlatformRefused: `no_lease` and the like.
        """

    def notifications(self) -> AsyncIterator[Notification]:
        """One WebSocket connection's notifications; ends when it closes.

        Raises:
            PlatformUnavailable: It could not be opened, or broke.
            HotkeyInUse: Closed with 4409.
            NotAuthorized: Closed with 4401, or the upgrade was refused.
        """

    async def close(self) -> None:
        """Close connections."""


class HotkeyInUse(PlatformError):
    """Another instance connected with our hotkey (4409): stop claiming, finish, exit 5."""
