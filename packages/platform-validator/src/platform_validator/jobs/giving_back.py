"""Giving a job back to the Platform API: tried until it is answered, or for as long as it makes sense."""

from __future__ import annotations

import random
from datetime import timedelta

import structlog

from platform_protocol.ids import JobId, LeaseToken
from platform_protocol.platform_messages import ReleaseReason
from platform_validator.clock import Clock
from platform_validator.platform_client.port import PlatformClient, PlatformError
from platform_validator.platform_client.retries import UNANSWERED, Kind, Over, decide

_log = structlog.get_logger(__name__)


class GivingBack:
    """Releases leases.

    Args:
        client: Takes them.
        clock: Time.
        rng: Jitter.
    """

    def __init__(self, *, client: PlatformClient, clock: Clock, rng: random.Random) -> None:
        self._client = client
        self._clock = clock
        self._rng = rng

    async def release(
        self, job_id: JobId, token: LeaseToken, reason: ReleaseReason, *, patience: float | None
    ) -> bool:
        """Release until answered, or for `patience` seconds (None: no end). Returns whether it was answered.

        A refusal is an answer: the lease was gone already.
        """
        began, failures = self._clock.monotonic(), 0
        limit = None if patience is None else timedelta(seconds=patience)
        while True:
            try:
                await self._client.release(job_id, token, reason)
            except PlatformError as error:
                failures += 1
                waited = self._clock.monotonic() - began
                step = decide(
                    Kind.RELEASE, error, failures=failures, waited=waited, rng=self._rng, patience=limit
                )
                if isinstance(step, Over):
                    _log.info("release_refused", job_id=job_id, code=step.code, error=str(error))
                    return step.code != UNANSWERED
                _log.warning("not_released", job_id=job_id, error=str(error), tries=failures)
                await self._clock.sleep(step.after)
            else:
                return True
