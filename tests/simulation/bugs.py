"""Faults that a validator must not have, each to be put in on purpose and caught by the laws.

Each replaces one piece of the real code for as long as its context lasts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from platform_protocol.ids import VmName
from platform_protocol.notifications import NewJob
from platform_protocol.platform_messages import Claim, Lease
from platform_validator.challenges.instance import Instance, InstanceRef
from platform_validator.challenges.runner import ChallengeRunner
from platform_validator.cvm import fleet as fleet_module
from platform_validator.cvm import sweeping
from platform_validator.cvm.destroyer import Destroyer
from platform_validator.cvm.errors import SessionLost
from platform_validator.cvm.quota import Quota, Reservation
from platform_validator.cvm.reclaim import Reclaim, plan_reclaim
from platform_validator.daemon.engine import Engine
from platform_validator.jobs.diary import Diary
from platform_validator.jobs.ending import Ending
from platform_validator.jobs.executor import JobExecutor
from platform_validator.jobs.lease import TaskRenewer
from platform_validator.jobs.outbox import Outbox
from platform_validator.jobs.result import Finding
from platform_validator.jobs.slot import Slot
from platform_validator.jobs.tenure import Tenure
from platform_validator.jobs.work import ClaimedJob
from platform_validator.platform_client.memory import MemoryPlatform
from platform_validator.platform_client.port import PlatformUnavailable
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import JobOutcome, JobRecord, OutboxRecord, Stage


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def stored_after_submit() -> Iterator[None]:
    """The result is sent first and stored when it was taken."""

    async def store_once(self: Any, job: ClaimedJob, outcome: JobOutcome, body: bytes) -> None:
        await self._outbox._client.submit_result(job.job_id, body)
        await original(self, job, outcome, body)

    original: Callable[..., Awaitable[None]] = Diary._store_once
    with _replaced(Diary, "_store_once", store_once):
        yield


@contextmanager
def released_twice() -> Iterator[None]:
    """A reservation comes back when its CVM is given up, and once more when it is gone."""

    def forgiving(self: Any, reservation: Reservation) -> None:
        self._held.pop(id(reservation), None)
        self._changed()

    def destroy(self: Any, name: VmName, reason: str | None = None, **named: Any) -> None:
        reservation = self._holdings._reservations.get(name)
        if reservation is not None:
            self._quota.release(reservation)
        original(self, name, reason, **named)

    original = fleet_module.Fleet.destroy
    with _replaced(Quota, "release", forgiving), _replaced(fleet_module.Fleet, "destroy", destroy):
        yield


@contextmanager
def silence_taken_for_yes() -> Iterator[None]:
    """After a restart an unanswered renewal counts as granted."""

    async def renewed(self: Any, job: ClaimedJob) -> float:
        job.asked_at = self._clock.boottime()
        try:
            term = await self._client.renew(job.job_id, job.claim.lease.token)
        except PlatformUnavailable:
            return job.claim.lease.term_s
        return float(term.total_seconds())

    with _replaced(Tenure, "_renewed", renewed):
        yield


@contextmanager
def push_trusted() -> Iterator[None]:
    """A pushed job is run at once, as if it had been claimed."""

    def new_job(self: Any, hint: NewJob) -> None:
        original(self, hint)
        jobs = self.parts.jobs
        ref = jobs._challenges.acquire(hint.challenge_id)
        if ref is None or hint.job_id in jobs._slots:
            return
        reservation = jobs._quota.reserve(ref.plan.resources, owner="trusting")
        if not isinstance(reservation, Reservation):
            ref.release()
            return
        claim = Claim(
            id=hint.job_id,
            challenge_id=hint.challenge_id,
            miner_hotkey="",
            attempt=1,
            lease=Lease(token="pushed", term_s=120.0),
            payload={},
            timeout_s=60,
            resources=ref.plan.resources,
        )
        running.add(asyncio.ensure_future(run(self, claim, ref, reservation)))

    async def run(self: Any, claim: Claim, ref: InstanceRef, reservation: Reservation) -> None:
        jobs, now = self.parts.jobs, self._clock.now()
        slot = Slot(claim.id, claim.challenge_id, jobs._new_id(), ref=ref)
        jobs._occupy(slot)
        try:
            record = JobRecord(
                claim_id=slot.claim_id,
                job_id=claim.id,
                challenge_id=claim.challenge_id,
                instance_key=ref.key,
                resources=claim.resources,
                stage=Stage.PENDING,
                claimed_at=now,
            )
            await jobs._store.open_claim(record)
            granted = claim.model_dump_json().encode()
            token = claim.lease.token
            await jobs._store.claim_granted(slot.claim_id, granted=granted, attempt=1, token=token, at=now)
            job = ClaimedJob(
                claim_id=slot.claim_id,
                claim=claim,
                plan=ref.plan,
                spec=ref.spec,
                asked_at=self._clock.boottime(),
                claimed_at=now,
                reservation=reservation,
            )
            await jobs._executor.execute_job(job)
        except StoreUnavailable:
            jobs._quota.release(reservation)
        finally:
            jobs._vacate(slot)

    original = Engine.new_job
    running: set[Any] = set()
    with _replaced(Engine, "new_job", new_job):
        yield


@contextmanager
def owned_by_prefix() -> Iterator[None]:
    """Whatever has our prefix in its name is ours to destroy."""

    def plan(records: Sequence[Any], seen: Any, held: Any, **named: Any) -> Reclaim:
        found = plan_reclaim(records, seen, held, **named)
        return Reclaim(destroy=found.destroy + found.strays, strays=())

    async def ids(_: Any, name: VmName, vmm: Any) -> set[str]:
        return {vm.id for vm in await vmm.list(name)}

    with (
        _replaced(sweeping, "plan_reclaim", plan),
        _replaced(Destroyer, "_ids", ids),
    ):
        yield


@contextmanager
def stale_token_taken() -> Iterator[None]:
    """The Platform API takes a result whatever token it comes under."""

    def held(self: Any, job_id: Any, token: Any) -> Any:
        job = self._job(job_id)
        return job if not job.finished else original(self, job_id, token)

    original = MemoryPlatform._held
    with _replaced(MemoryPlatform, "_held", held):
        yield


@contextmanager
def never_renewed() -> Iterator[None]:
    """Leases are held, and never renewed."""

    async def run(self: Any, *_arguments: Any) -> None:
        await asyncio.Event().wait()

    with _replaced(TaskRenewer, "_run", run):
        yield


@contextmanager
def silence_taken_for_no() -> Iterator[None]:
    """A result that is not answered leaves the outbox."""

    async def note(self: Any, entry: OutboxRecord, *_arguments: Any) -> None:
        await self._settle(entry, "no_answer")

    with _replaced(Outbox, "_note", note):
        yield


@contextmanager
def sent_once() -> Iterator[None]:
    """A result that is not answered is never sent again."""

    async def note(self: Any, _entry: OutboxRecord, tries: Any, *_arguments: Any) -> None:
        tries.due = float("inf")

    def wake(self: Any, *, retry: bool = False) -> None:
        del retry
        self._wake.set()

    with _replaced(Outbox, "_note", note), _replaced(Outbox, "wake", wake):
        yield


@contextmanager
def slot_until_destroyed() -> Iterator[None]:
    """A job keeps its slot until its CVM is gone."""

    async def execute(self: Any, job: ClaimedJob) -> Ending:
        ending = await original(self, job)
        while job.vm is not None and any(view.name == job.vm for view in self._fleet.views()):
            await asyncio.sleep(0.5)
        return ending

    original = JobExecutor.execute_job
    with _replaced(JobExecutor, "execute_job", execute):
        yield


@contextmanager
def old_version_first() -> Iterator[None]:
    """The version that serves is given up as soon as another is wanted."""

    async def begin(self: Any, candidate: Instance) -> None:
        if self._instances.serving is not None:
            await self._withdraw()
        await original(self, candidate)

    original = ChallengeRunner._begin
    with _replaced(ChallengeRunner, "_begin", begin):
        yield


@contextmanager
def death_scored() -> Iterator[None]:
    """A CVM that dies counts as a failure of the submission in it."""

    async def evaluate(self: Any, job: ClaimedJob, *arguments: Any) -> tuple[Finding, Any]:
        try:
            return await original(self, job, *arguments)
        except SessionLost:
            return Finding.timed_out("timeout"), None

    original = JobExecutor.evaluate_submission
    with _replaced(JobExecutor, "evaluate_submission", evaluate):
        yield


FIVE = {
    "stored-after-submit": stored_after_submit,
    "released-twice": released_twice,
    "silence-taken-for-yes": silence_taken_for_yes,
    "push-trusted": push_trusted,
    "owned-by-prefix": owned_by_prefix,
}
"""By the names that the command line knows."""

FURTHER = {
    "stale-token-taken": stale_token_taken,
    "never-renewed": never_renewed,
    "silence-taken-for-no": silence_taken_for_no,
    "sent-once": sent_once,
    "slot-until-destroyed": slot_until_destroyed,
    "old-version-first": old_version_first,
    "death-scored": death_scored,
}
"""For the laws that none of the five breaks."""

BUGS = FIVE | FURTHER


@contextmanager
def apply(bug: str | None) -> Iterator[None]:
    """Put a bug in for as long as the context lasts; None: none."""
    if bug is None:
        yield
        return
    with BUGS[bug]():
        yield
