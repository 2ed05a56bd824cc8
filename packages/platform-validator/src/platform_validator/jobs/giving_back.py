"""Giving a job back to the Platform API: tried until it is answered, or for as long as it makes sense."""

from __future__ import annotations

import random
from datetime import timedelta

import structlog

from platform_protocol.ids import JobId, LeaseToken
from platform_protocol.platform_messages import ReleaseReason
from platform_validator.clock import Clock
from platform_validator.platform_client.backoff import Backoff
from platform_validator.platform_client.port import PlatformClient, PlatformError, PlatformUnavailable

RETRY = Backoff(timedelta(milliseconds=500), timedelta(seconds=10))

_log = structlog.get_logger(__name__)


class GivingBack:
    """Releases leases.

    Args:
        client: Takes them.
        clock: Time.
        rng: Jitter.
        retry: Between two tries.
    """

    def __init__(
        self, *, client: PlatformClient, clock: Clock, rng: random.Random, retry: Backoff = RETRY
    ) -> None:
        self._client = client
        self._clock = clock
        self._rng = rng
        self._retry = retry

    async def release(
        self, job_id: JobId, token: LeaseToken, reason: ReleaseReason, *, patience: float | None
    ) -> bool:
        """Release until answered, or for `patience` seconds (None: no end). Returns whether it was answered.

        A refusal is an answer: the lease was gone already.
        """
        gives_up_at = None if patience is None else self._clock.monotonic() + patience
        failures = 0
        while True:
            try:
                await self._client.release(job_id, token, reason)
            except PlatformUnavailable as error:
                failures += 1
                _log.warning("not_released", job_id=job_id, error=str(error), tries=failures)
                if gives_up_at is not None and self._clock.monotonic() >= gives_up_at:
                    return False
                await self._clock.sleep(self._retry.wait(failures, self._rng, error.retry_after))
            except PlatformError as error:
                _log.info("release_refused", job_id=job_id, error=str(error))
                return True
            else:
                return True
