"""Delivering stored results until each is acknowledged or definitely refused; nothing else removes one."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from platform_protocol.ids import ClaimId
from platform_validator.clock import Clock
from platform_validator.crashpoint import crashpoint
from platform_validator.jobs.observe import JobMetrics
from platform_validator.platform_client.port import PlatformClient, PlatformError
from platform_validator.platform_client.retries import TABLE, Kind, Over, decide
from platform_validator.store.port import Store, StoreError, StoreUnavailable
from platform_validator.store.records import OutboxRecord

AT_ONCE = 8
_IDLE = 60.0
_FIRST = TABLE[Kind.RESULT].pause.first.total_seconds()

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
            pause = _FIRST
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
        except PlatformError as error:
            tries = self._tries[entry.claim_id]
            tries.failures += 1
            step = decide(Kind.RESULT, error, failures=tries.failures, waited=0.0, rng=self._rng)
            if isinstance(step, Over):
                self._metrics.delivery(step.code)
                log.warning("result_refused", code=step.code, error=str(error))
                await self._settle(entry, step.code)
                return
            tries.due = self._clock.monotonic() + step.after
            await self._note(entry, tries, error)
        else:
            self._metrics.delivery("accepted")
            log.info("result_accepted")
            await self._settle(entry, None)

    async def _note(self, entry: OutboxRecord, tries: _Tries, error: PlatformError) -> None:
        self._metrics.delivery("unanswered")
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
            self._tries[entry.claim_id].due = self._clock.monotonic() + _FIRST
