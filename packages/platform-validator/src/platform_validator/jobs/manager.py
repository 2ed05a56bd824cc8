"""Noticing jobs: one loop, woken by a push or by the poll, that lists, decides and has them claimed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import timedelta

import structlog
from pydantic import ValidationError

from platform_protocol.ids import ChallengeId, ClaimId, JobId
from platform_protocol.platform_messages import PendingJob, ReleaseReason
from platform_protocol.resources import Resources
from platform_validator.challenges.instance import InstanceRef
from platform_validator.challenges.kit import KitUnreadable
from platform_validator.challenges.manager import ChallengeManager
from platform_validator.clock import Clock
from platform_validator.cvm.placement import Wish
from platform_validator.cvm.quota import Quota, Refusal
from platform_validator.jobs.capacity import Capacity, CapacityFacts, Need, NoCapacity, covers, has_capacity
from platform_validator.jobs.claiming import Claimer
from platform_validator.jobs.ending import Ending, died
from platform_validator.jobs.ends import JobEnds
from platform_validator.jobs.executor import JobExecutor
from platform_validator.jobs.gates import ClaimGates
from platform_validator.jobs.inherited import inherited_job
from platform_validator.jobs.left_cvm import LeftCvm
from platform_validator.jobs.observe import JobMetrics
from platform_validator.jobs.passed_over import PassedOver
from platform_validator.jobs.recovery import Inheritance
from platform_validator.jobs.slot import Slot, wish_of
from platform_validator.jobs.waiting import Tally, Waiting
from platform_validator.jobs.waking import Waking
from platform_validator.jobs.work import ClaimedJob, JobView
from platform_validator.platform_client.port import PlatformClient, PlatformError
from platform_validator.platform_client.retries import TABLE, Kind, asked_for
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import JobOutcome, JobRecord, VmRecord

POLL_EVERY = timedelta(seconds=5)
DECLINED_FOR = timedelta(minutes=10)
NOT_GRANTED_FOR = TABLE[Kind.CLAIM].pause.cap

_Kind = tuple[ChallengeId, int, int, int, int, int]
"""What tells jobs apart of which one fits while another does not."""

_log = structlog.get_logger(__name__)


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
        ends: Writes down how jobs without a result ended.
        metrics: Is told.
        can_attest: Whether attestation is possible now, at the level in force.
        poll_every: Between polls, with a tenth of jitter either way.
        beat: Called at every turn of the loop.
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
        ends: JobEnds,
        metrics: JobMetrics,
        can_attest: Callable[[], bool] = lambda: True,
        poll_every: timedelta = POLL_EVERY,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.beat = beat
        self._ends = ends
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
        self._waking = Waking(clock, rng, poll_every.total_seconds())
        self._claimer = Claimer(
            client=client,
            store=store,
            clock=clock,
            rng=rng,
            ends=ends,
            metrics=metrics,
        )
        self._slots: dict[JobId, Slot] = {}
        self._gates = ClaimGates()
        self._held: frozenset[JobId] = frozenset()
        self._declined: dict[JobId, float] = {}
        self._passed_over = PassedOver()
        self._refused: dict[_Kind, tuple[Capacity, Wish]] = {}
        self._active: frozenset[ChallengeId] = frozenset()
        self._tally = Tally()
        self.waiting: tuple[Waiting, ...] = ()
        self._inherited = Inheritance()
        self._idle = asyncio.Event()
        self._idle.set()
        self._claiming = True
        self._lacking_room = self._asked_room = False
        self.last_error: str | None = None

    # What others ask

    def wake(self, source: str = "push") -> None:
        """Make a pass soon; any number of calls before it fold into that one."""
        self._waking.wake(source)

    def inherit(self, inheritance: Inheritance) -> None:
        """Before `run`: go on with what an earlier process left."""
        self._inherited = inheritance
        for record, _ in inheritance.adopt:
            self._occupy(Slot(record.job_id, record.challenge_id, record.claim_id))

    async def forget_submissions(self) -> None:
        """At start: submissions on disk that belong to no job which goes on are removed."""
        claims = {record.claim_id for record, _ in self._inherited.adopt}
        await asyncio.to_thread(self._executor.submissions.keep_only, claims)

    def hint_cancelled(self, job_id: JobId) -> None:
        """A push says that a job was cancelled: ask with a renewal, and believe only the answer."""
        slot = self._slots.get(job_id)
        if slot is not None and slot.claimed is not None and slot.claimed.lease is not None:
            slot.claimed.lease.renew_now()

    def cancel(self, job_id: JobId) -> bool:
        """The operator ends a job here: it is given back, and not claimed again by us for a while.

        Returns:
            Whether it was running: a stored result goes on to be submitted.
        """
        slot = self._slots.get(job_id)
        job = slot.claimed if slot is not None else None
        if job is None or job.stored:
            return False
        self._declined[job_id] = self._clock.monotonic() + DECLINED_FOR.total_seconds()
        ending = Ending(JobOutcome.CANCELLED, "operator", ReleaseReason.OPERATOR, job.stage)
        job.stop(ending)
        # One whose lease is not being kept yet finds it when it comes to that.
        job.ending = job.ending or ending
        return True

    def resize(self, max_concurrent: int) -> None:
        """Another number of slots; jobs over it finish."""
        self._max = max_concurrent
        self.wake("local")

    def bear_outages(self, grace: timedelta) -> None:
        """Another time for which the first renewal after a restart may stay unanswered."""
        self._executor.tenure.outage_grace = grace

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

    def closed_gates(self) -> dict[ChallengeId, bool]:
        """Of each challenge whose jobs were claimed: whether its gate is closed now."""
        return self._gates.closed(self._clock.monotonic())

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
        self._active = frozenset(self._challenges.active_ids())
        return self._capacity(job, ref, wish_of(job, ref))

    def _capacity(self, job: PendingJob, ref: InstanceRef | None, wish: Wish) -> Capacity:
        return has_capacity(
            Need(job.id, job.challenge_id, wish.resources),
            CapacityFacts(
                claiming=self._claiming,
                held=frozenset({job.id}) if self._holds(job.id) else frozenset(),
                active=self._active,
                can_attest=self._can_attest(),
                gate_open=self._gates.admits(job.challenge_id, self._clock.monotonic()),
                room=self._quota.would(wish, kept=self._passed_over.kept_from(job)),
                ready=ref.ready_size() if ref is not None else None,
                shared=ref is not None and ref.shared and covers(ref.plan.resources, wish.resources),
                active_jobs=len(self._slots),
                max_jobs=self._max,
            ),
        )

    def _holds(self, job_id: JobId) -> bool:
        return job_id in self._held or job_id in self._slots or job_id in self._declined

    # The loop

    async def run(self) -> None:
        """Until cancelled, which releases the jobs that run."""
        async with asyncio.TaskGroup() as group:
            inherited, self._inherited = self._inherited, Inheritance()
            left = self._executor.left_cvms(vm.name for _, vm in inherited.adopt)
            for record, vm in inherited.adopt:
                group.create_task(self._go_on(record, vm, left[vm.name]))
            for record in inherited.release:
                group.create_task(self._executor.release_inherited(record))
            while True:
                source = self._waking.taken()
                self._metrics.pass_made(source)
                try:
                    await self._pass(group, source)
                    self.last_error = None
                except (PlatformError, StoreUnavailable) as error:
                    self.last_error = str(error)
                    self._waking.hold_off(asked_for(Kind.LIST, error))
                    _log.warning("jobs_not_listed", error=str(error))
                self._metrics.slots(len(self._slots), self._max)
                self.beat()
                await self._waking.rest(
                    lacking_room=self._lacking_room, conflicts=lambda: self._claimer.conflicts
                )

    async def _pass(self, group: asyncio.TaskGroup, source: str) -> None:
        self._lacking_room = self._asked_room = False
        now = self._clock.monotonic()
        self._declined = {job_id: until for job_id, until in self._declined.items() if until > now}
        await self._ends.retry()
        active = self._challenges.active_ids()
        if (reason := self._not_listing(active)) is not None:
            self.waiting = () if reason is NoCapacity.NOT_ACTIVE else (Waiting(reason, None),)
            return
        pending = await self._client.pending_jobs(active)
        self._held = frozenset(record.job_id for record in await self._store.open_jobs())
        self._passed_over.begin({job.id for job in pending}, now, self._quota.keep)
        self._refused.clear()
        self._active = frozenset(self._challenges.active_ids())
        for job in pending:
            if len(self._slots) >= self._max:
                break
            self._consider(job, group, source)
        self.waiting, self._tally = self._tally.rows(), Tally()
        for row in self.waiting:
            self._metrics.passed_over(row.reason, row.jobs or 0)

    def _not_listing(self, active: Sequence[ChallengeId]) -> NoCapacity | None:
        """Why no job could be claimed, whichever are pending."""
        if not self._claiming:
            return NoCapacity.STOPPED
        if not active:
            return NoCapacity.NOT_ACTIVE
        return NoCapacity.JOBS if len(self._slots) >= self._max else None

    def _consider(self, job: PendingJob, group: asyncio.TaskGroup, source: str) -> None:
        kind, kept = _kind(job), self._passed_over.kept
        before = self._refused.get(kind)
        if before is not None and not self._holds(job.id) and (kept is None or kept.job_id != job.id):
            # A pass only takes room: what did not fit before does not fit now.
            self._pass_over(job, *before)
            return
        ref = self._challenges.acquire(job.challenge_id)
        wish = wish_of(job, ref)
        answer = self._capacity(job, ref, wish)
        slot = self._set_aside(job, ref, wish, answer, source) if answer and ref is not None else None
        if slot is None or ref is None:
            if answer.refusal not in {None, NoCapacity.HELD}:
                self._refused[kind] = answer, wish
            self._pass_over(job, answer, wish)
            if ref is not None:
                ref.release()
            return
        self._challenges.room_taken()
        self._passed_over.forget(job.id)
        self._occupy(slot)
        self._gates.claimed(job.challenge_id)
        group.create_task(self._claim_and_execute(slot, ref, wish.resources))

    def _pass_over(self, job: PendingJob, answer: Capacity, wish: Wish) -> None:
        self._tally.add(answer)
        if not answer.lacks_room:
            # Room would not help it: none is kept for it.
            self._passed_over.forget(job.id)
            return
        self._passed_over.noted(job, wish, self._clock.monotonic())
        if not self._asked_room:
            # An idle ready CVM yields, one a pass: the next pass sees whether its room was enough.
            self._asked_room = True
            self._lacking_room = self._challenges.make_room(beside=None)

    def _set_aside(
        self, job: PendingJob, ref: InstanceRef, wish: Wish, answer: Capacity, source: str
    ) -> Slot | None:
        """What the job needs, before it is claimed."""
        slot = Slot(job.id, job.challenge_id, ClaimId(self._new_id()), job.created_at, ref, source=source)
        slot.cvm = ref.take_ready() if answer.uses_ready else None
        if slot.cvm is None:
            reservation = self._quota.reserve(
                wish.resources, owner=slot.claim_id, image=wish.image, kept=self._passed_over.kept_from(job)
            )
            if isinstance(reservation, Refusal):
                return None
            slot.reservation = reservation
        return slot

    async def _claim_and_execute(self, slot: Slot, ref: InstanceRef, need: Resources) -> None:
        try:
            claimed = await self._claimer.claim(slot, ref, need)
            if claimed is None:
                # It may go on being listed: asked for again at once, it would be refused without end.
                self._declined[slot.job_id] = self._clock.monotonic() + NOT_GRANTED_FOR.total_seconds()
                self._gates.withdrawn(slot.challenge_id)
                return
            slot.cvm = slot.reservation = None
            await self._execute(slot, claimed)
        except StoreUnavailable as error:
            _log.error("job_not_journaled", job_id=slot.job_id, error=str(error))
            self._gates.withdrawn(slot.challenge_id)
        finally:
            self._vacate(slot)

    async def _go_on(self, record: JobRecord, vm: VmRecord, left: LeftCvm) -> None:
        """A job that runs in a CVM which an earlier process left."""
        slot = self._slots[record.job_id]
        try:
            job = inherited_job(record, vm, left, boottime=self._clock.boottime())
        except (KitUnreadable, ValidationError) as error:
            _log.error("job_not_adoptable", job_id=record.job_id, error=str(error))
            left.let_go()
            await self._executor.release_inherited(record)
        else:
            await self._execute(slot, job)
        finally:
            self._vacate(slot)

    async def _execute(self, slot: Slot, job: ClaimedJob) -> None:
        slot.claimed = job
        ending = await self._executor.execute_job(job)
        if slot.ref is not None and died(ending):
            slot.ref.condemn(ending.reason or ending.outcome.value)
        self._gates.ended(slot.challenge_id, ending, self._clock.monotonic())

    def _occupy(self, slot: Slot) -> None:
        self._slots[slot.job_id] = slot
        self._idle.clear()

    def _vacate(self, slot: Slot) -> None:
        """Give back what was set aside and never handed to the executor, and the slot."""
        if slot.cvm is not None and slot.ref is not None:
            slot.ref.give_back(slot.cvm)
        if slot.reservation is not None:
            self._quota.release(slot.reservation)
        slot.cvm = slot.reservation = None
        if slot.ref is not None:
            slot.ref.release()
        del self._slots[slot.job_id]
        if not self._slots:
            self._idle.set()
        self.wake("local")


def _kind(job: PendingJob) -> _Kind:
    size = job.resources
    return (
        job.challenge_id,
        job.priority,
        size.cpu_cores,
        size.memory_mb,
        size.disk_mb,
        size.gpu_count,
    )
