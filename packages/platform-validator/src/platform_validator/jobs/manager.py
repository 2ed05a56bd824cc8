"""Noticing and claiming: one loop, woken by a push or by the poll, that lists, decides and claims."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import structlog

from platform_protocol.ids import ChallengeId, ClaimId, JobId
from platform_protocol.platform_messages import Claim, PendingJob, ReleaseReason
from platform_protocol.resources import Resources
from platform_validator.challenges.instance import InstanceRef
from platform_validator.challenges.manager import ChallengeManager
from platform_validator.challenges.room import Guest
from platform_validator.clock import Clock
from platform_validator.cvm.quota import Quota, Refusal, Reservation
from platform_validator.jobs.capacity import Capacity, CapacityFacts, Need, has_capacity, largest
from platform_validator.jobs.ending import Ending
from platform_validator.jobs.executor import JobExecutor
from platform_validator.jobs.gate import ClaimGate
from platform_validator.jobs.observe import JobMetrics
from platform_validator.jobs.work import ClaimedJob, JobView
from platform_validator.platform_client.backoff import Backoff
from platform_validator.platform_client.port import (
    AlreadyClaimed,
    PlatformClient,
    PlatformError,
    PlatformRefused,
    PlatformUnavailable,
)
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import JobOutcome, JobRecord, Stage

POLL_EVERY = timedelta(seconds=5)
CLAIM_RETRY = Backoff(timedelta(seconds=1), timedelta(seconds=10))
CLAIM_PATIENCE = timedelta(minutes=2)
_ROOM_RETRY = 0.5
_SPREAD = 0.05

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Slot:
    """A job that occupies a slot: from just before its claim until its result is stored."""

    job: PendingJob
    claim_id: ClaimId
    ref: InstanceRef
    cvm: Guest | None
    reservation: Reservation | None
    claimed: ClaimedJob | None = None


class JobManager:
    """The loop.

    Args:
        client: Lists and claims.
        store: The journal.
        challenges: Says what is Active, and hands out instances.
        quota: Reserves before a claim.
        executor: Runs what was claimed.
        clock: Time.
        rng: Jitter.
        new_id: Makes claim ids (UUIDs).
        max_concurrent: Slots.
        metrics: Is told.
        can_attest: Whether attestation is possible now, at the level in force.
        poll_every: Between polls, with a tenth of jitter either way.
    """

    def __init__(
        self,
        *,
        client: PlatformClient,
        store: Store,
        challenges: ChallengeManager,
        quota: Quota,
        executor: JobExecutor,
        clock: Clock,
        rng: random.Random,
        new_id: Callable[[], str],
        max_concurrent: int,
        metrics: JobMetrics,
        can_attest: Callable[[], bool] = lambda: True,
        poll_every: timedelta = POLL_EVERY,
    ) -> None:
        self._client = client
        self._store = store
        self._challenges = challenges
        self._quota = quota
        self._executor = executor
        self._clock = clock
        self._rng = rng
        self._new_id = new_id
        self._max = max_concurrent
        self._metrics = metrics
        self._can_attest = can_attest
        self._poll = poll_every.total_seconds()
        self._slots: dict[JobId, _Slot] = {}
        self._gates: dict[ChallengeId, ClaimGate] = {}
        self._held: frozenset[JobId] = frozenset()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._source = "poll"
        self._claiming = True
        self._conflicts = 0
        self._lacking_room = False
        self.last_error: str | None = None

    # What others ask

    def wake(self, source: str = "push") -> None:
        """Make a pass soon; any number of calls before it fold into that one."""
        self._source = source
        self._wake.set()

    def hint_cancelled(self, job_id: JobId) -> None:
        """A push says that a job was cancelled: ask with a renewal, and believe only the answer."""
        slot = self._slots.get(job_id)
        if slot is not None and slot.claimed is not None and slot.claimed.lease is not None:
            slot.claimed.lease.renew_now()

    def stop_claiming(self) -> None:
        """Claim no more; what runs goes on."""
        self._claiming = False

    @property
    def claiming(self) -> bool:
        """Whether jobs are being claimed."""
        return self._claiming

    async def idle(self) -> None:
        """Wait until no job occupies a slot."""
        await self._idle.wait()

    def views(self) -> list[JobView]:
        """The jobs that occupy slots and are granted, oldest first."""
        return [slot.claimed.view() for slot in self._slots.values() if slot.claimed is not None]

    async def recent(self, limit: int) -> list[JobView]:
        """The newest jobs of the journal, as they are now; claims that were never granted are left out."""
        live = {view.claim_id: view for view in self.views()}
        records = await self._store.recent_jobs(limit)
        return [live.get(each.claim_id) or JobView.of(each) for each in records if each.attempt is not None]

    def has_capacity(self, job: PendingJob, ref: InstanceRef | None) -> Capacity:
        """Whether this job may be claimed now (the usage guide's checks, in its order)."""
        view = self._quota.view()
        return has_capacity(
            Need(job.id, job.challenge_id, _size(job, ref)),
            CapacityFacts(
                claiming=self._claiming,
                held=self._held | self._slots.keys(),
                active=frozenset(self._challenges.active_ids()),
                can_attest=self._can_attest(),
                gate_open=self._gate(job.challenge_id).admits(self._clock.monotonic()),
                free=view.free,
                ready=ref.ready_size() if ref is not None else None,
                active_jobs=len(self._slots),
                max_jobs=self._max,
                cvms=view.cvms,
                max_cvms=view.max_cvms,
            ),
        )

    # The loop

    async def run(self) -> None:
        """Until cancelled, which releases the jobs that run."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._metrics.pass_made(self._source)
                self._source = "poll"
                try:
                    await self._pass(group)
                    self.last_error = None
                except (PlatformError, StoreUnavailable) as error:
                    self.last_error = str(error)
                    _log.warning("jobs_not_listed", error=str(error))
                self._metrics.slots(len(self._slots), self._max)
                await self._rest()

    async def _rest(self) -> None:
        pause = _ROOM_RETRY if self._lacking_room else self._poll * self._rng.uniform(0.9, 1.1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._wake.wait()
        if self._wake.is_set() and self._source == "push" and self._conflicts:
            # Others were pushed too: spread out a little, the more the oftener we came second.
            await self._clock.sleep(self._rng.uniform(0.0, _SPREAD) * self._conflicts)
        self._wake.clear()

    async def _pass(self, group: asyncio.TaskGroup) -> None:
        self._lacking_room = False
        active = self._challenges.active_ids()
        if not self._claiming or not active or len(self._slots) >= self._max:
            return
        pending = await self._client.pending_jobs(active)
        self._held = frozenset(record.job_id for record in await self._store.open_jobs())
        for job in pending:
            if len(self._slots) >= self._max:
                break
            self._consider(job, group)

    def _consider(self, job: PendingJob, group: asyncio.TaskGroup) -> None:
        ref = self._challenges.acquire(job.challenge_id)
        answer = self.has_capacity(job, ref)
        slot = self._slot(job, ref, answer) if answer and ref is not None else None
        if slot is None:
            if ref is not None:
                ref.release()
            if answer.refusal is not None:
                self._metrics.passed_over(answer.refusal)
            if answer.lacks_room and not self._lacking_room:
                # One yields a pass: the next pass sees whether its room was enough.
                self._lacking_room = self._challenges.make_room(beside=None)
            return
        self._challenges.room_taken()
        self._slots[job.id] = slot
        self._idle.clear()
        self._gates[job.challenge_id] = self._gate(job.challenge_id).claimed()
        group.create_task(self._claim_and_execute(slot))

    def _slot(self, job: PendingJob, ref: InstanceRef, answer: Capacity) -> _Slot | None:
        """Set aside what the job needs, before it is claimed."""
        claim_id = ClaimId(self._new_id())
        cvm = ref.take_ready() if answer.uses_ready else None
        if cvm is not None:
            return _Slot(job, claim_id, ref, cvm, None)
        reservation = self._quota.reserve(_size(job, ref), owner=claim_id)
        if isinstance(reservation, Refusal):
            return None
        return _Slot(job, claim_id, ref, None, reservation)

    async def _claim_and_execute(self, slot: _Slot) -> None:
        challenge_id = slot.job.challenge_id
        try:
            claimed = await self._claim(slot)
            if claimed is None:
                self._gates[challenge_id] = self._gate(challenge_id).withdrawn()
                return
            slot.claimed = claimed
            slot.cvm = slot.reservation = None
            ending = await self._executor.execute_job(claimed)
            self._gates[challenge_id] = self._after(self._gate(challenge_id), ending)
        except StoreUnavailable as error:
            _log.error("job_not_journaled", job_id=slot.job.id, error=str(error))
            self._gates[challenge_id] = self._gate(challenge_id).withdrawn()
        finally:
            self._give_back(slot)
            del self._slots[slot.job.id]
            if not self._slots:
                self._idle.set()
            self.wake("local")

    async def _claim(self, slot: _Slot) -> ClaimedJob | None:
        """Journal, then ask; an answer that was lost is asked for again under the same claim id."""
        job, claim_id = slot.job, slot.claim_id
        claimed_at = self._clock.now()
        await self._store.open_claim(
            JobRecord(
                claim_id=claim_id,
                job_id=job.id,
                challenge_id=job.challenge_id,
                instance_key=slot.ref.key,
                resources=_size(job, slot.ref),
                stage=Stage.PENDING,
                claimed_at=claimed_at,
            )
        )
        answer = await self._ask_for(slot)
        if answer is None:
            return None
        claim, asked_at = answer
        try:
            await self._store.claim_granted(
                claim_id,
                granted=claim.model_dump_json().encode(),
                attempt=claim.attempt,
                token=claim.lease.token,
                at=self._clock.now(),
            )
        except StoreUnavailable:
            # What cannot be journaled must not be run; `operator` counts to no limit of the job.
            with contextlib.suppress(PlatformError):
                await self._client.release(job.id, claim.lease.token, ReleaseReason.OPERATOR)
            raise
        self._metrics.claim_answered("granted")
        self._conflicts = max(self._conflicts - 1, 0)
        _log.info("job_claimed", job_id=job.id, attempt=claim.attempt, challenge_id=job.challenge_id)
        return ClaimedJob(
            claim_id=claim_id,
            claim=claim,
            ref=slot.ref,
            asked_at=asked_at,
            claimed_at=claimed_at,
            cvm=slot.cvm,
            reservation=slot.reservation,
            vm=slot.cvm.name if slot.cvm is not None else None,
        )

    async def _ask_for(self, slot: _Slot) -> tuple[Claim, float] | None:
        """The claim and CLOCK_BOOTTIME from before the request that was answered."""
        gives_up_at = self._clock.monotonic() + CLAIM_PATIENCE.total_seconds()
        failures = 0
        while True:
            asked_at = self._clock.boottime()
            try:
                return await self._client.claim(slot.job.id, slot.claim_id), asked_at
            except PlatformRefused as error:
                await self._not_granted(slot, error.code, conflict=isinstance(error, AlreadyClaimed))
                return None
            except PlatformUnavailable as error:
                failures += 1
                _log.warning("claim_unanswered", job_id=slot.job.id, error=str(error), tries=failures)
                self._metrics.claim_answered("unanswered")
                if self._clock.monotonic() >= gives_up_at:
                    await self._not_granted(slot, "claim_unanswered", conflict=False)
                    return None
                await self._clock.sleep(CLAIM_RETRY.wait(failures, self._rng, error.retry_after))

    async def _not_granted(self, slot: _Slot, code: str, *, conflict: bool) -> None:
        self._metrics.claim_answered(code)
        self._conflicts = min(self._conflicts + 1, 10) if conflict else self._conflicts
        _log.info("claim_not_granted", job_id=slot.job.id, code=code)
        await self._store.end_job(
            slot.claim_id, outcome=JobOutcome.CANCELLED, reason=code, at=self._clock.now()
        )

    def _give_back(self, slot: _Slot) -> None:
        """What was set aside and never handed to the executor."""
        if slot.cvm is not None:
            slot.ref.give_back(slot.cvm)
        if slot.reservation is not None:
            self._quota.release(slot.reservation)
        slot.cvm = slot.reservation = None
        slot.ref.release()

    def _gate(self, challenge_id: ChallengeId) -> ClaimGate:
        return self._gates.get(challenge_id, ClaimGate())

    def _after(self, gate: ClaimGate, ending: Ending) -> ClaimGate:
        match ending.outcome:
            case JobOutcome.SUCCEEDED | JobOutcome.FAILED | JobOutcome.TIMEOUT:
                return gate.succeeded()
            case JobOutcome.INFRA_ERROR if ending.release is not ReleaseReason.CAPACITY:
                return gate.failed(ending.stage, self._clock.monotonic())
            case _:
                return gate.withdrawn()


def _size(job: PendingJob, ref: InstanceRef | None) -> Resources:
    """What a CVM for this job needs: the challenge's size, or the job's where that is larger."""
    return job.resources if ref is None else largest(ref.plan.resources, job.resources)
