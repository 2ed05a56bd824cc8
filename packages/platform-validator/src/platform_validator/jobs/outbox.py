"""Delivering stored results until each is acknowledged or definitely refused; nothing else removes one."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import structlog

from platform_protocol.ids import ClaimId
from platform_validator.clock import Clock
from platform_validator.crashpoint import crashpoint
from platform_validator.jobs.observe import JobMetrics
from platform_validator.platform_client.backoff import Backoff
from platform_validator.platform_client.port import (
    JobUnknown,
    LeaseRefused,
    PlatformClient,
    PlatformError,
    PlatformUnavailable,
    ResultRefused,
)
from platform_validator.store.port import Store, StoreError, StoreUnavailable
from platform_validator.store.records import OutboxRecord

RETRY = Backoff(timedelta(seconds=1), timedelta(seconds=30))
AT_ONCE = 8
_IDLE = 60.0

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Tries:
    failures: int = 0
    due: float = 0.0


class Outbox:
    """The loop. A result is sent as it is stored, byte for byte, with no renewal before it.

    Args:
        client: Takes the results.
        store: Keeps them.
        clock: Time.
        rng: Jitter.
        metrics: Is told.
    """

    def __init__(
        self, *, client: PlatformClient, store: Store, clock: Clock, rng: random.Random, metrics: JobMetrics
    ) -> None:
        self._client = client
        self._store = store
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._urgent = False
        self.beat: Callable[[], None] = lambda: None
        self._tries: dict[ClaimId, _Tries] = {}
        self.depth = 0

    def wake(self, *, retry: bool = False) -> None:
        """A result was stored; with `retry`, the Platform API is back: try everything now."""
        self._urgent = self._urgent or retry
        self._wake.set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            pause = RETRY.first.total_seconds()
            try:
                pause = await self.deliver()
            except StoreUnavailable as error:
                _log.error("outbox_unreadable", error=str(error))
            self.beat()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()

    async def deliver(self) -> float:
        """Try everything that is due; returns the seconds until the next is."""
        entries = await self._store.outbox()
        now = self._clock.monotonic()
        urgent, self._urgent = self._urgent, False
        self._tries = {each.claim_id: self._tries.get(each.claim_id, _Tries()) for each in entries}
        due = [each for each in entries if urgent or self._tries[each.claim_id].due <= now]
        async with asyncio.TaskGroup() as group:
            for entry in due[:AT_ONCE]:
                group.create_task(self._try(entry))
        left = await self._store.outbox()
        self.depth = len(left)
        oldest = max(((self._clock.now() - each.stored_at).total_seconds() for each in left), default=0.0)
        self._metrics.outbox(len(left), oldest)
        now = self._clock.monotonic()
        waits = [self._tries[each.claim_id].due - now for each in left if each.claim_id in self._tries]
        if len(waits) < len(left):
            return 0.0
        return max(min([_IDLE, *waits]), 0.0)

    async def _try(self, entry: OutboxRecord) -> None:
        log = _log.bind(job_id=entry.job_id, claim_id=entry.claim_id)
        try:
            crashpoint("submit_sent")
            await self._client.submit_result(entry.job_id, entry.body)
            crashpoint("submit_acknowledged")
        except (LeaseRefused, ResultRefused, JobUnknown) as error:
            self._metrics.delivery(error.code)
            log.warning("result_refused", code=error.code, error=str(error))
            await self._settle(entry, error.code)
        except PlatformError as error:
            await self._again(entry, error)
        else:
            self._metrics.delivery("accepted")
            self._metrics.platform_contact()
            log.info("result_accepted")
            await self._settle(entry, None)

    async def _again(self, entry: OutboxRecord, error: PlatformError) -> None:
        self._metrics.delivery("unanswered")
        tries = self._tries[entry.claim_id]
        tries.failures += 1
        asked = error.retry_after if isinstance(error, PlatformUnavailable) else None
        tries.due = self._clock.monotonic() + RETRY.wait(tries.failures, self._rng, asked)
        _log.warning("result_not_delivered", job_id=entry.job_id, error=str(error), tries=tries.failures)
        with contextlib.suppress(StoreError):
            await self._store.outbox_tried(entry.claim_id, str(error)[:500])

    async def _settle(self, entry: OutboxRecord, refusal: str | None) -> None:
        """Write the answer down; when that fails the same body is sent again, which changes nothing."""
        try:
            if refusal is not None:
                await self._store.outbox_refused(entry.claim_id, refusal, at=self._clock.now())
                return
            await self._store.outbox_delivered(entry.claim_id, at=self._clock.now())
        except StoreUnavailable as error:
            _log.error("delivery_not_stored", job_id=entry.job_id, error=str(error))
            self._tries[entry.claim_id].due = self._clock.monotonic() + RETRY.first.total_seconds()
