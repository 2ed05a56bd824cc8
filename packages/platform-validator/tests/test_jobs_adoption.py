"""What an earlier process left is gone on with, given back or submitted: never run again, never blamed."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from job_house import CHALLENGE, CVM, TOML, House, answered, new_commit, tick

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken, VmName
from platform_protocol.platform_messages import ReleaseReason
from platform_validator.challenges.memory import MemorySession
from platform_validator.clock import SystemClock
from platform_validator.cvm.session import GuestResult, JobOrder
from platform_validator.jobs import executor
from platform_validator.jobs.inherited import inherited_job
from platform_validator.jobs.left_cvm import LeftCvm
from platform_validator.jobs.recovery import Fate, Inheritance, left_behind, recover
from platform_validator.store.records import JobOutcome, JobRecord, Purpose, Stage, VmPhase, VmRecord

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Work = Callable[[MemorySession, JobOrder, Path | None], Awaitable[GuestResult]]

JOB = JobRecord(
    claim_id=ClaimId("claim"),
    job_id=JobId("job"),
    challenge_id=ChallengeId("challenge"),
    instance_key="key",
    resources=CVM,
    stage=Stage.RUNNING,
    claimed_at=NOW,
    token=LeaseToken("token"),
    kit=b"kit",
    vm=VmName("pv-0123456789-1"),
)
VM = VmRecord(
    name=VmName("pv-0123456789-1"),
    purpose=Purpose.JOB,
    challenge_id=JOB.challenge_id,
    instance_key="key",
    resources=CVM,
    phase=VmPhase.READY,
    sealed_secret=b"",
    compose=b"",
    host_port=0,
    session_id="",
    intended_at=NOW,
    hard_deadline=NOW + timedelta(hours=2),
    attestation="none",
)


@pytest.mark.parametrize(
    ("job", "vm", "in_outbox", "fate"),
    [
        (JOB, VM, True, Fate.SUBMIT),
        (JOB, None, True, Fate.SUBMIT),
        (replace(JOB, stage=Stage.SUBMITTED), None, False, Fate.FINISH),
        (replace(JOB, stage=Stage.PENDING, token=None, kit=None, vm=None), None, False, Fate.FORGET),
        (JOB, VM, False, Fate.ADOPT),
        (replace(JOB, stage=Stage.COLLECTING), VM, False, Fate.ADOPT),
        (JOB, None, False, Fate.RELEASE),
        (replace(JOB, kit=None, stage=Stage.ATTESTING), VM, False, Fate.RELEASE),
        (JOB, replace(VM, phase=VmPhase.CREATED), False, Fate.RELEASE),
        (JOB, replace(VM, attestation=None), False, Fate.RELEASE),
        (JOB, replace(VM, hard_deadline=NOW + timedelta(minutes=1)), False, Fate.RELEASE),
    ],
)
def test_what_becomes_of_an_open_job(
    job: JobRecord, vm: VmRecord | None, in_outbox: bool, fate: Fate
) -> None:
    """The table of `left_behind`, each row of it."""
    assert left_behind(job, vm, in_outbox=in_outbox, now=NOW) is fate


class Guest:
    """A guest that outlives validators: it begins a job once, and ends it when it is told to."""

    def __init__(self, ends: dict[str, object] | None) -> None:
        self.begun: list[tuple[JobId, int]] = []
        self.reached = asyncio.Event()
        self.may_end = asyncio.Event()
        self.ends = ends
        self.begins = True

    async def work(self, session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        """See `MemorySession`."""
        del submission
        already = (order.job_id, order.attempt) in self.begun
        self.reached.set()
        if not self.begins:
            await asyncio.Event().wait()
        if not already:
            self.begun.append((order.job_id, order.attempt))
        session.started(already)
        await self.may_end.wait()
        return answered(order, self.ends)


@asynccontextmanager
async def killed(house: House, guest: Guest) -> AsyncIterator[House]:
    """A second validator on the journal and the CVMs of a first one that was killed while it ran a job."""
    house.work = guest.work
    async with house.open():
        await guest.reached.wait()
        if guest.begins:
            while not guest.begun:
                await tick()
        second = House(house.folder, platform=house.platform, store=copy.deepcopy(house.store))
        second.work = guest.work
        second.fleet.alive = dict(house.fleet.alive)
        second.fleet.numbers = itertools.count(1000)
        _silence(house)
    found = await recover(store=second.store, fleet=second.fleet, clock=SystemClock())
    second.jobs.inherit(found)
    async with second.open():
        yield second


def _silence(house: House) -> None:
    """Whatever it says from now on, nobody hears: it is dead, and its loops do not know it yet."""

    async def unheard(*_: object, **__: object) -> None:
        return None

    for name in ("release", "submit_result"):
        setattr(house.client, name, unheard)


@pytest.fixture(autouse=True)
def brief_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled guest is given a moment, and not three seconds."""
    monkeypatch.setattr(executor, "CANCEL_GRACE", timedelta(milliseconds=20))


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A validator with one published challenge, and a lease that outlives a restart."""
    made = House(tmp_path)
    made.platform.term = timedelta(seconds=30)
    made.publish(new_commit(tmp_path, TOML))
    return made


@pytest.mark.robustness(1, "each-point")
async def test_a_running_job_goes_on_in_its_cvm_after_a_kill(house: House) -> None:
    """The same attempt, the same CVM, no second start; and its result counts."""
    guest = Guest({"score": 0.75})
    job_id = house.platform.add_job(CHALLENGE)
    async with killed(house, guest) as second:
        while house.platform.calls.count("renew") < 1:
            await tick()
        guest.may_end.set()
        await second.ended(job_id)
        await second.journaled(job_id, JobOutcome.SUCCEEDED)
        await second.all_gone()
    job = house.platform.jobs[job_id]
    assert guest.begun == [(job_id, 1)]
    assert (job.outcome, job.attempt, job.releases) == ("succeeded", 1, [])
    assert job.result is not None
    assert job.result.score == 0.75


async def test_after_a_restart_only_an_answered_renewal_lets_a_job_go_on(house: House) -> None:
    """The lease lapsed and the job went to somebody else: nothing is submitted, the CVM is destroyed."""
    guest = Guest({"score": 0.75})
    job_id = house.platform.add_job(CHALLENGE)
    house.work = guest.work
    async with house.open():
        await guest.reached.wait()
        while not guest.begun:
            await tick()
        second = House(house.folder, platform=house.platform, store=copy.deepcopy(house.store))
        second.fleet.alive = dict(house.fleet.alive)
        second.fleet.numbers = itertools.count(1000)
        _silence(house)
    house.platform.lapse(job_id)
    await house.platform.client().claim(job_id, ClaimId("somebody-else"))
    guest.may_end.set()
    found = await recover(store=second.store, fleet=second.fleet, clock=SystemClock())
    assert found.fates["adopt"] == 1
    second.jobs.inherit(found)
    async with second.open():
        await second.journaled(job_id, JobOutcome.LEASE_LOST)
        await second.all_gone()
    assert house.platform.jobs[job_id].attempt == 2
    assert house.platform.jobs[job_id].result is None


async def test_a_cvm_that_died_meanwhile_is_no_fault_of_the_submission(house: House) -> None:
    """Adopted, and not there any more: given back, without a score."""
    guest = Guest({"score": 0.75})
    job_id = house.platform.add_job(CHALLENGE)
    async with killed(house, guest) as second:
        second.fleet.alive.clear()
        while not house.platform.jobs[job_id].releases and house.platform.jobs[job_id].attempt == 1:
            await tick()
    assert house.platform.jobs[job_id].result is None


def record_that_ran(boottime: float, house_record: JobRecord, since: float) -> JobRecord:
    """The same record, as if it had begun to run at `since`."""
    kit = house_record.kit or b""
    head, _, rest = kit.partition(b",")
    assert head.startswith(b'{"running_since_boot":')
    assert since <= boottime
    return replace(house_record, kit=f'{{"running_since_boot":{since!r}'.encode() + b"," + rest)


async def journaled_run(house: House, guest: Guest) -> tuple[JobRecord, VmRecord]:
    """A job's record and its CVM's, as a killed validator leaves them."""
    house.work = guest.work
    house.platform.add_job(CHALLENGE, timeout_s=600)
    async with house.open():
        await guest.reached.wait()
        (record,) = await house.store.open_jobs()
        assert record.vm is not None
        vm = await house.store.vm(record.vm)
        assert vm is not None
    return record, vm


@pytest.mark.robustness(5, "jump")
async def test_the_time_that_a_job_ran_before_is_counted_on_the_boot_clock(house: House) -> None:
    """A wall clock that jumped uses nothing up, and a reboot gives it all of its time again."""
    record, vm = await journaled_run(house, Guest({"score": 1.0}))
    left = LeftCvm(vm.name, house.fleet)
    ran = inherited_job(record_that_ran(5000.0, record, 4700.0), vm, left, boottime=5000.0).ran
    assert ran == timedelta(seconds=300)
    rebooted = inherited_job(record_that_ran(5000.0, record, 4700.0), vm, left, boottime=20.0).ran
    assert rebooted == timedelta(0)


async def test_a_job_that_the_sdk_had_not_begun_has_all_of_its_time(house: House) -> None:
    """Killed between the journal's `running` and the SDK's start: nothing of its time is gone."""
    guest = Guest({"score": 0.5})
    guest.begins = False
    job_id = house.platform.add_job(CHALLENGE, timeout_s=1)
    async with killed(house, guest) as second:
        guest.begins = True
        guest.may_end.set()
        await second.ended(job_id)
    assert house.platform.jobs[job_id].outcome == "succeeded"


async def test_nothing_inherited_is_nothing_done(house: House) -> None:
    """An empty journal is recovered at once, and again."""
    for _ in range(2):
        found = await recover(store=house.store, fleet=house.fleet, clock=SystemClock())
        assert found == Inheritance(fates=dict.fromkeys((fate.value for fate in Fate), 0))


async def test_an_operator_s_cancellation_gives_the_job_back_and_does_not_take_it_again(house: House) -> None:
    """Released with the operator's reason; the SDK is told; others may have it, this validator waits."""
    guest = Guest({"score": 0.5})
    job_id = house.platform.add_job(CHALLENGE)
    house.work = guest.work
    async with house.open():
        while not guest.begun:
            await tick()
        assert house.jobs.cancel(job_id)
        await house.journaled(job_id, JobOutcome.CANCELLED)
        await house.all_gone()
        house.jobs.wake("push")
        later = house.platform.add_job(CHALLENGE)
        guest.may_end.set()
        await house.ended(later)
        assert not house.jobs.cancel(job_id)
    assert house.platform.jobs[job_id].releases == [ReleaseReason.OPERATOR]
    assert house.platform.jobs[job_id].status == "pending"
    (cancelled, why), *_ = next(cvm.session.cancelled for cvm in house.fleet.booted if cvm.session.cancelled)
    assert (cancelled, why) == (job_id, "operator")


async def test_a_cvm_that_does_not_answer_at_its_timeout_is_not_the_submission_s_fault(house: House) -> None:
    """The submission ran out of time in a CVM that died beneath it: `sandbox_died`, never `timeout`."""
    guest = Guest(None)
    job_id = house.platform.add_job(CHALLENGE, timeout_s=1)

    async def dying(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.dead = True
        return await guest.work(session, order, submission)

    house.work = dying
    async with house.open():
        while not house.platform.jobs[job_id].releases:
            await tick()
    assert house.platform.jobs[job_id].releases[0] is ReleaseReason.SANDBOX_DIED
    assert house.platform.jobs[job_id].result is None
