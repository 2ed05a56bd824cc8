"""Submissions on disk: fetched for a claim, never unpacked here, removed when the claim is over."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Collection
from pathlib import Path

import structlog

from platform_protocol.ids import ClaimId
from platform_validator.clock import Clock
from platform_validator.jobs.work import ClaimedJob
from platform_validator.platform_client.port import PlatformClient, PlatformError
from platform_validator.platform_client.retries import Kind, Over, decide

_log = structlog.get_logger(__name__)


class Submissions:
    """The folder of submissions.

    Args:
        folder: Made when it is needed.
        client: Where they come from.
        clock: Time.
        rng: Jitter.
    """

    def __init__(self, folder: Path, *, client: PlatformClient, clock: Clock, rng: random.Random) -> None:
        self._folder = folder
        self._client = client
        self._clock = clock
        self._rng = rng

    async def fetch(self, job: ClaimedJob) -> Path | None:
        """A job's submission, checked; None for a job without one. What an earlier process fetched is kept.

        Raises:
            PlatformError: It cannot be had; silence of the API is waited out.
            OSError: It cannot be written.
        """
        submission = job.claim.submission
        if submission is None:
            return None
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True, mode=0o700)
        target = self._path(job.claim_id)
        if job.adopts is not None and target.exists():
            return target
        failures = 0
        while True:
            try:
                await self._client.fetch_submission(submission, target)
            except PlatformError as error:
                # The lease lives through an outage, and so does the fetch; a refused renewal ends both.
                failures += 1
                step = decide(Kind.SUBMISSION, error, failures=failures, waited=0.0, rng=self._rng)
                if isinstance(step, Over):
                    raise
                _log.warning("submission_not_fetched", tries=failures, error=str(error))
                await self._clock.sleep(step.after)
            else:
                return target

    def forget(self, job: ClaimedJob) -> None:
        """Remove a job's submission, if it is there."""
        self._path(job.claim_id).unlink(missing_ok=True)

    def keep_only(self, claims: Collection[ClaimId]) -> None:
        """Remove those of other claims: an earlier process left them."""
        with contextlib.suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                if path.name not in claims:
                    path.unlink(missing_ok=True)

    def _path(self, claim_id: ClaimId) -> Path:
        # Named by our own id: nothing of the submission's name reaches the file system.
        return self._folder / claim_id
