"""Claiming one job: journaled before it is sent, asked for again when the answer is lost."""

from __future__ import annotations

import contextlib
import random

import structlog

from platform_protocol.platform_messages import Claim, ReleaseReason
from platform_protocol.resources import Resources
from platform_validator.challenges.instance import InstanceRef
from platform_validator.clock import Clock
from platform_validator.crashpoint import crashpoint
from platform_validator.jobs.ends import JobEnds
from platform_validator.jobs.observe import JobMetrics
from platform_validator.jobs.slot import Slot
from platform_validator.jobs.work import ClaimedJob
from platform_validator.platform_client.port import AlreadyClaimed, PlatformClient, PlatformError
from platform_validator.platform_client.retries import Kind, Over, decide
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import JobOutcome, JobRecord, Stage

_log = structlog.get_logger(__name__)


class Claimer:
    """Claims for a manager.

    Args:
        client: Grants.
        store: The journal.
        clock: Time.
        rng: Jitter.
        ends: Writes down claims that were not granted.
        metrics: Is told.
    """

    def __init__(
        self,
        *,
        client: PlatformClient,
        store: Store,
        clock: Clock,
        rng: random.Random,
        ends: JobEnds,
        metrics: JobMetrics,
    ) -> None:
        self._ends = ends
        self._client = client
        self._store = store
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self.conflicts = 0

    async def claim(self, slot: Slot, ref: InstanceRef, size: Resources) -> ClaimedJob | None:
        """Journal, ask, journal the answer. None: it was not granted.

        Raises:
            StoreUnavailable: The journal cannot be written: nothing is held.
        """
        claimed_at = self._clock.now()
        await self._store.open_claim(
            JobRecord(
                claim_id=slot.claim_id,
                job_id=slot.job_id,
                challenge_id=slot.challenge_id,
                instance_key=ref.key,
                resources=size,
                stage=Stage.PENDING,
                claimed_at=claimed_at,
            )
        )
        crashpoint("claim_sent")
        answer = await self._ask_for(slot)
        if answer is None:
            return None
        crashpoint("claim_acknowledged")
        claim, asked_at = answer
        try:
            await self._store.claim_granted(
                slot.claim_id,
                granted=claim.model_dump_json().encode(),
                attempt=claim.attempt,
                token=claim.lease.token,
                at=self._clock.now(),
            )
        except StoreUnavailable:
            # What cannot be journaled must not be run; `operator` counts to no limit of the job.
            with contextlib.suppress(PlatformError):
                await self._client.release(slot.job_id, claim.lease.token, ReleaseReason.OPERATOR)
            await self._ends.end(slot.claim_id, JobOutcome.INFRA_ERROR, "not_journaled")
            raise
        crashpoint("claim_stored")
        self._granted(slot, claim)
        ref.claimed()
        return ClaimedJob(
            claim_id=slot.claim_id,
            claim=claim,
            plan=ref.plan,
            spec=ref.spec,
            kit=ref.kit,
            asked_at=asked_at,
            claimed_at=claimed_at,
            cvm=slot.cvm,
            reservation=slot.reservation,
            vm=slot.cvm.name if slot.cvm is not None else None,
            shared=ref.shared and slot.cvm is not None,
        )

    def _granted(self, slot: Slot, claim: Claim) -> None:
        self.conflicts = max(self.conflicts - 1, 0)
        self._metrics.claim_answered("granted")
        self._metrics.claim_dispatched(slot.source)
        if slot.created_at is not None:
            self._metrics.queued(max((self._clock.now() - slot.created_at).total_seconds(), 0.0))
        _log.info("job_claimed", job_id=slot.job_id, attempt=claim.attempt, challenge_id=slot.challenge_id)

    async def _ask_for(self, slot: Slot) -> tuple[Claim, float] | None:
        """The claim and CLOCK_BOOTTIME from before the request that was answered."""
        began, failures = self._clock.monotonic(), 0
        while True:
            asked_at = self._clock.boottime()
            try:
                return await self._client.claim(slot.job_id, slot.claim_id), asked_at
            except PlatformError as error:
                failures += 1
                waited = self._clock.monotonic() - began
                step = decide(Kind.CLAIM, error, failures=failures, waited=waited, rng=self._rng)
                if isinstance(step, Over):
                    await self._not_granted(slot, step.code, conflict=isinstance(error, AlreadyClaimed))
                    return None
                _log.warning("claim_unanswered", job_id=slot.job_id, error=str(error), tries=failures)
                self._metrics.claim_answered("unanswered")
                await self._clock.sleep(step.after)

    async def _not_granted(self, slot: Slot, code: str, *, conflict: bool) -> None:
        self._metrics.claim_answered(code)
        self.conflicts = min(self.conflicts + 1, 10) if conflict else self.conflicts
        _log.info("claim_not_granted", job_id=slot.job_id, code=code)
        await self._ends.end(slot.claim_id, JobOutcome.CANCELLED, code)
