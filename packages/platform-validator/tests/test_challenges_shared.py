"""`shared` mode over the twins: one CVM runs the jobs, so many at once, and outlives them."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
from job_house import CHALLENGE, TOML, House, answered, good, new_commit, tick

from platform_protocol.ids import JobId
from platform_protocol.platform_messages import ReleaseReason
from platform_protocol.resources import Resources
from platform_validator.challenges import pool
from platform_validator.challenges.memory import MemorySession
from platform_validator.clock import SystemClock
from platform_validator.cvm.errors import SessionLost
from platform_validator.cvm.session import GuestResult, JobOrder
from platform_validator.cvm.usage import VmUsage
from platform_validator.jobs import executor
from platform_validator.jobs.recovery import recover
from platform_validator.store.records import InstanceState, JobOutcome

SHARED = TOML + '[execution]\ncvm = "shared"\nconcurrency = 2\n'


class Work:
    """Jobs that end when they are let, and what was seen of them."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.running: list[JobId] = []
        self.most = 0
        self.sessions: dict[JobId, MemorySession] = {}
        self.told: Counter[bool] = Counter()

    async def __call__(self, session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        already = order.job_id in self.sessions
        self.sessions[order.job_id] = session
        self.told[already] += 1
        session.started(already)
        self.running.append(order.job_id)
        self.most = max(self.most, len(self.running))
        try:
            await self.go_on.wait()
        finally:
            self.running.remove(order.job_id)
        return answered(order, {"score": 0.5})


@pytest.fixture(autouse=True)
def brief_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled guest is given a moment, and not three seconds."""
    monkeypatch.setattr(executor, "CANCEL_GRACE", timedelta(milliseconds=20))


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A validator with one shared challenge."""
    made = House(tmp_path)
    made.publish(new_commit(tmp_path, SHARED))
    return made


async def reached(work: Work, jobs: int) -> None:
    """Wait until so many run."""
    while len(work.running) < jobs:
        await tick()


async def test_jobs_share_one_cvm_up_to_its_concurrency(house: House) -> None:
    """Two at once of five, in the one CVM that was booted, and it is there afterwards."""
    work = house.work = Work()
    house.fleet.used = VmUsage(cpu_time_ms=5, network_bytes=5)
    jobs = [house.platform.add_job(CHALLENGE) for _ in range(5)]
    async with house.open():
        await reached(work, 2)
        await house.passes(3)
        assert len(work.running) == 2
        work.go_on.set()
        for job_id in jobs:
            await house.ended(job_id)
        assert work.most == 2
        assert len({id(session) for session in work.sessions.values()}) == 1
        assert len(house.fleet.booted) == len(house.fleet.alive) == 1
        assert house.quota.view().cvms == 1
        assert house.challenges.views()[0].serving.mode == "shared"  # type: ignore[union-attr] # it serves
    usages = [result.resource_usage for job_id in jobs if (result := house.platform.jobs[job_id].result)]
    assert usages == [VmUsage().reported()] * 5, "whose a shared CVM's use was, nobody can tell"


async def test_an_update_moves_new_jobs_and_the_old_cvm_goes_with_its_last(house: House) -> None:
    """Old and new side by side; each result has the commit that its job was claimed for."""
    work = house.work = Work()
    first = house.platform.add_job(CHALLENGE)
    async with house.open():
        await reached(work, 1)
        (old,) = house.fleet.booted
        commit = new_commit(house.folder, SHARED)
        house.publish(commit)
        house.challenges.wake()
        while (serving := house.challenges.views()[0].serving) is None or serving.commit != commit:
            await tick()
        assert old.name in house.fleet.alive
        assert old.name not in house.fleet.destroyed
        second = house.platform.add_job(CHALLENGE)
        await reached(work, 2)
        work.go_on.set()
        await house.ended(first)
        await house.ended(second)
        while house.challenges.views()[0].old:
            await tick()
        assert house.fleet.destroyed == [old.name]
    results = [house.platform.jobs[job_id].result for job_id in (first, second)]
    assert [result.github_commit for result in results if result] == [old.plan.commit, commit]


async def test_a_shared_cvm_that_dies_is_failed_with_the_reason_and_another_comes(house: House) -> None:
    """Its jobs are released as sandbox_died, never scored, and run in the next one."""
    died = asyncio.Event()

    async def dying(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.started(False)
        house.work = good
        session.die()
        died.set()
        raise SessionLost("the CVM is gone")

    house.work = dying
    job_id = house.platform.add_job(CHALLENGE)
    async with house.open():
        await died.wait()
        await house.ended(job_id)
        await house.journaled(job_id, JobOutcome.SANDBOX_DIED)
        (first, second) = house.fleet.booted
        assert first.name in house.fleet.destroyed
        assert second.name not in house.fleet.destroyed
    job = house.platform.jobs[job_id]
    assert job.releases == [ReleaseReason.SANDBOX_DIED]
    assert (job.outcome, job.attempt) == ("succeeded", 2)
    history = await house.store.challenge_history(CHALLENGE, 50)
    (failed,) = [event for event in history if event.state is InstanceState.FAILED]
    assert failed.reason is not None
    assert failed.reason.startswith("its CVM")


async def test_an_idle_shared_cvm_that_ends_is_noticed_without_a_job(house: House) -> None:
    """Nobody uses it, and still the challenge is not Active with a dead CVM."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.fleet.booted[0].session.die()
        while len(house.fleet.booted) < 2:
            await tick()
        await house.state(InstanceState.ACTIVE)
        await house.ended(house.platform.add_job(CHALLENGE))


async def test_a_job_too_large_for_the_shared_cvm_has_its_own(house: House) -> None:
    """It would never fit; its CVM is of its size, and goes with it."""
    large = Resources(cpu_cores=2, memory_mb=256, disk_mb=512)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        job_id = house.platform.add_job(CHALLENGE, resources=large)
        await house.ended(job_id)
        own = house.fleet.booted[-1]
        assert own.plan.resources.cpu_cores == 2
        while own.name not in house.fleet.destroyed:
            await tick()
        assert house.fleet.booted[0].name not in house.fleet.destroyed


async def test_a_cancelled_job_gives_its_seat_up_and_no_cvm(house: House) -> None:
    """The SDK is told, and the next job takes the seat."""
    work = house.work = Work()
    async with house.open():
        first, second = house.platform.add_job(CHALLENGE), house.platform.add_job(CHALLENGE)
        await reached(work, 2)
        third = house.platform.add_job(CHALLENGE)
        house.platform.cancel_job(first)
        while third not in work.running:
            await tick()
        (cvm,) = house.fleet.booted
        assert (first, "job_cancelled") in cvm.session.cancelled
        work.go_on.set()
        for job_id in (second, third):
            await house.ended(job_id)
        assert house.fleet.destroyed == []


async def test_an_idle_shared_cvm_yields_to_a_job_that_has_no_room(tmp_path: Path) -> None:
    """The challenge stays Active without it, and boots another when there is room again."""
    house = House(tmp_path, limits=Resources(cpu_cores=2, memory_mb=1024, disk_mb=4096))
    house.publish(new_commit(tmp_path, SHARED))
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        job_id = house.platform.add_job(
            CHALLENGE, resources=Resources(cpu_cores=2, memory_mb=256, disk_mb=512)
        )
        await house.ended(job_id)
        assert house.fleet.booted[0].name in house.fleet.destroyed
        assert house.challenges.views()[0].state is InstanceState.ACTIVE


async def test_a_shared_cvm_is_replaced_before_its_lifetime_ends(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another stands beside it; what runs in the old one ends there, and then it goes."""
    work = house.work = Work()
    async with house.open():
        first = house.platform.add_job(CHALLENGE)
        await reached(work, 1)
        (old,) = house.fleet.booted
        monkeypatch.setattr(pool, "SHARED_FOR", timedelta(0))
        house.challenges.wake()
        second = house.platform.add_job(CHALLENGE)
        while len(house.fleet.booted) < 2:
            await tick()
        monkeypatch.setattr(pool, "SHARED_FOR", timedelta(days=6))
        await reached(work, 2)
        assert old.name in house.fleet.alive
        third = house.platform.add_job(CHALLENGE)
        await reached(work, 3)
        assert work.sessions[third] is not work.sessions[first]
        work.go_on.set()
        for job_id in (first, second, third):
            await house.ended(job_id)
        while old.name not in house.fleet.destroyed:
            await tick()
        assert house.challenges.views()[0].state is InstanceState.ACTIVE
    history = await house.store.challenge_history(CHALLENGE, 50)
    assert not any(event.state is InstanceState.FAILED for event in history)


async def test_after_a_crash_all_jobs_of_a_shared_cvm_go_on_in_it_and_it_goes_with_the_last(
    house: House,
) -> None:
    """It is adopted once, for both; the next life's own CVM is another."""
    work = house.work = Work()
    house.platform.term = timedelta(seconds=30)
    jobs = [house.platform.add_job(CHALLENGE, timeout_s=600) for _ in range(2)]
    async with house.open():
        await reached(work, 2)
        (old,) = house.fleet.booted
        again = House(house.folder, platform=house.platform, store=copy.deepcopy(house.store))
        # Killed here: whatever the first one says from now on, nobody hears.
        for name in ("release", "submit_result"):
            setattr(house.client, name, _unheard)
    again.work = work
    again.fleet.numbers = itertools.count(100)
    again.fleet.alive[old.name] = old
    again.jobs.inherit(await recover(store=again.store, fleet=again.fleet, clock=SystemClock()))
    async with again.open():
        await reached(work, 2)
        assert work.told[True] == 2
        work.go_on.set()
        for job_id in jobs:
            await again.ended(job_id)
        while old.name not in again.fleet.destroyed:
            await tick()
        await again.state(InstanceState.ACTIVE)
        assert again.fleet.booted[0].name != old.name
    assert [house.platform.jobs[job_id].attempt for job_id in jobs] == [1, 1]


async def _unheard(*_: object, **__: object) -> None:
    return None
