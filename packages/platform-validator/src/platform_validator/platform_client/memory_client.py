"""The Platform API port over the platform in memory, as one validator sees it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_protocol.platform_messages import Claim, PendingJob, ReleaseReason, SubmissionRef
from platform_validator.platform_client.port import ActiveList, Notification, SubmissionUnusable

if TYPE_CHECKING:
    from platform_validator.platform_client.memory import Fault, MemoryPlatform


class MemoryPlatformClient:
    """The port over a `MemoryPlatform`."""

    def __init__(self, platform: MemoryPlatform, *, hotkey: str, instance: str) -> None:
        self._platform = platform
        self._hotkey = hotkey
        self._instance = instance
        self._seen: int | None = None

    def _answer(self, call: str) -> list[Fault]:
        return self._platform.enter(call, self._hotkey)

    async def health(self) -> None:
        """Answers while the platform is up."""
        self._answer("health")

    async def active_challenges(self) -> ActiveList:
        """The active challenges."""
        lost = self._answer("active_challenges")
        challenges, self._seen, changed = self._platform.active(self._seen)
        _lose(lost)
        return ActiveList(challenges, changed)

    async def pending_jobs(
        self, challenge_ids: Sequence[ChallengeId], limit: int = 100
    ) -> Sequence[PendingJob]:
        """Pending jobs of these challenges."""
        if not challenge_ids:
            return ()
        self._answer("pending_jobs")
        return self._platform.pending(challenge_ids, limit)

    async def claim(self, job_id: JobId, claim_id: ClaimId) -> Claim:
        """Claim it."""
        lost = self._answer("claim")
        claim = self._platform.claim(job_id, claim_id, self._hotkey)
        _lose(lost)
        return claim

    async def renew(self, job_id: JobId, token: LeaseToken) -> timedelta:
        """Renew."""
        lost = self._answer("renew")
        term = self._platform.renew(job_id, token)
        _lose(lost)
        return term

    async def release(self, job_id: JobId, token: LeaseToken, reason: ReleaseReason) -> None:
        """Give it back."""
        lost = self._answer("release")
        self._platform.release(job_id, token, reason)
        _lose(lost)

    async def send_logs(self, job_id: JobId, token: LeaseToken, seq: int, lines: Sequence[str]) -> None:
        """Send log lines."""
        del seq
        lost = self._answer("send_logs")
        self._platform.logs(job_id, token, lines)
        _lose(lost)

    async def submit_result(self, job_id: JobId, body: bytes) -> None:
        """Send a result."""
        lost = self._answer("submit_result")
        self._platform.results(job_id, body)
        _lose(lost)

    async def fetch_submission(self, submission: SubmissionRef, target: Path) -> None:
        """Write the bytes that the platform holds, if they are what the claim names."""
        self._answer("fetch_submission")
        job_id = JobId(submission.url.removeprefix("/submissions/").removesuffix("/bundle"))
        job = self._platform.jobs.get(job_id)
        if job is None:
            raise SubmissionUnusable(f"the submission's URL leaves the platform: {submission.url!r}")
        data = self._platform.bundle(job, self._hotkey)
        if len(data) != submission.size or hashlib.sha256(data).hexdigest() != submission.sha256:
            raise SubmissionUnusable("the submission is not what the claim names")
        await asyncio.to_thread(_write, target, data)

    async def notifications(self) -> AsyncIterator[Notification]:
        """One connection's notifications."""
        self._answer("notifications")
        queue = self._platform.connect(self._hotkey, self._instance)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._platform.disconnect(queue)

    async def close(self) -> None:
        """Nothing to close."""


def _write(target: Path, data: bytes) -> None:
    target.touch(mode=0o600)
    target.write_bytes(data)


def _lose(lost: list[Fault]) -> None:
    for fault in lost:
        raise fault.error
