"""What a running job writes into the journal: the stages that it enters, and its result."""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from platform_validator.clock import Clock
from platform_validator.jobs.ending import Ending
from platform_validator.jobs.observe import JobMetrics
from platform_validator.jobs.outbox import Outbox
from platform_validator.jobs.work import ClaimedJob
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import JobOutcome, Stage

_STORE_RETRY = 2.0
_ORDER = list(Stage)

_log = structlog.get_logger(__name__)


class Diary:
    """Writes for running jobs.

    Args:
        store: The journal.
        outbox: Woken when a result was stored.
        clock: Time.
        metrics: Is told how long stages took.
    """

    def __init__(self, *, store: Store, outbox: Outbox, clock: Clock, metrics: JobMetrics) -> None:
        self._store = store
        self._outbox = outbox
        self._clock = clock
        self._metrics = metrics

    def begin(self, job: ClaimedJob) -> None:
        """Its first stage is measured from here."""
        job.stage_since = self._clock.monotonic()

    async def enter(self, job: ClaimedJob, stage: Stage) -> None:
        """Enter a stage: shown at once, then journaled; never backwards."""
        if _ORDER.index(stage) <= _ORDER.index(job.stage):
            return
        now = self._clock.monotonic()
        self._metrics.stage_took(job.stage, now - job.stage_since)
        job.stage, job.stage_since = stage, now
        _log.info("job_stage", stage=stage)
        async with job.journal:
            if job.stage is stage and not job.stored:
                try:
                    now_is = self._clock.now()
                    since = self._clock.boottime()
                    kit = job.kit(since) if stage is Stage.RUNNING and job.kit is not None else None
                    await self._store.advance(job.claim_id, stage, at=now_is, vm=job.vm, kit=kit)
                except StoreUnavailable as error:
                    # A stage is for people and for recovery, which reads a lost one as the one before.
                    _log.error("stage_not_stored", stage=stage, error=str(error))

    async def keep_result(self, job: ClaimedJob, outcome: JobOutcome, body: bytes) -> None:
        """Durable, or tried again while the lease is kept: a full disk loses no result."""
        while True:
            try:
                async with job.journal:
                    await self._store_once(job, outcome, body)
            except StoreUnavailable as error:
                _log.error("result_not_stored", error=str(error))
                await self._clock.sleep(_STORE_RETRY)
            else:
                return

    async def _store_once(self, job: ClaimedJob, outcome: JobOutcome, body: bytes) -> None:
        """What was begun is finished even when the job is cancelled meanwhile: stored, it is submitted."""
        writing = asyncio.ensure_future(
            self._store.store_result(job.claim_id, outcome, body, at=self._clock.now())
        )
        try:
            await asyncio.shield(writing)
        finally:
            while not writing.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({writing})
            if not writing.cancelled() and writing.exception() is None:
                job.stored, job.stage = True, Stage.SUBMITTING
                job.ending = Ending(outcome)
                self._outbox.wake()
                _log.info("result_stored", outcome=outcome)
