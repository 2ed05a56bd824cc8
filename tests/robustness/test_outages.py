"""Robustness 10: the Platform API is away: a second, a minute, half an hour, in each phase of a job."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest
from tests.daemon.world import CHALLENGE, World, begun, play, until

PHASES = ("claiming", "booting", "running", "submitting")
OUTAGES = {"1 s": 1.0, "1 min": 60.0, "30 min": 1800.0}


@pytest.mark.robustness(10, "outage")
@pytest.mark.parametrize("outage", OUTAGES)
@pytest.mark.parametrize("phase", PHASES)
def test_every_result_is_delivered_once_and_within_a_minute_of_the_return(
    tmp_path: Path, phase: str, outage: str
) -> None:
    """Robustness 10: as long as nobody else claimed the job: one attempt, one result, soon."""

    async def story(world: World) -> None:
        world.platform.term = timedelta(minutes=2)
        if phase == "claiming":
            engine = world.engine()
            running = asyncio.create_task(engine.run())
            await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
            world.platform.fail_next("claim")
            job_id = world.platform.add_job(CHALLENGE, timeout_s=7200)
            await until(lambda: "claim" in world.platform.calls)
        else:
            engine, running, job_id = await begun(world, "booting" if phase == "booting" else "running")
        world.platform.down = True
        world.guests.may_boot.set()
        world.guests.may_finish.set()
        if phase == "submitting":
            await until(lambda: engine.parts.outbox.depth == 1)
        await asyncio.sleep(OUTAGES[outage])
        world.platform.down = False
        back = asyncio.get_running_loop().time()
        await until(lambda: world.platform.jobs[job_id].finished)
        if phase != "claiming":
            # A claim that was never granted has no result yet: it takes its place in the queue.
            assert asyncio.get_running_loop().time() - back <= 60
        job = world.platform.jobs[job_id]
        assert (job.status, job.attempt, job.releases) == ("completed", 1, [])
        engine.drain("the story is over")
        await running
        assert not await world.store.outbox()

    play(story, tmp_path)


@pytest.mark.robustness(10, "grace")
def test_an_outage_longer_than_its_grace_ends_the_work_and_nothing_else(tmp_path: Path) -> None:
    """Robustness 10: after an hour without an answer the CVM is given up; the daemon claims again later."""

    async def story(world: World) -> None:
        world.platform.term = timedelta(minutes=2)
        engine, running, job_id = await begun(world, "running")
        world.platform.down = True
        await asyncio.sleep(3500)
        assert [view.job_id for view in engine.parts.jobs.views()] == [job_id]
        await until(lambda: not engine.parts.jobs.views())
        await until(lambda: not world.vmm.machines())
        assert not await world.store.outbox()
        world.platform.down = False
        world.guests.may_finish.set()
        await until(lambda: world.platform.jobs[job_id].finished)
        assert world.platform.jobs[job_id].attempt == 2
        engine.drain("the story is over")
        await running

    play(story, tmp_path)


@pytest.mark.robustness(10, "outage")
@pytest.mark.parametrize("outage", OUTAGES)
def test_what_was_queued_meanwhile_is_claimed_and_delivered_within_a_minute(
    tmp_path: Path, outage: str
) -> None:
    """Robustness 10: nobody was told of it: the poll finds it, or the greeting of the next connection."""

    async def story(world: World) -> None:
        engine = world.engine()
        running = asyncio.create_task(engine.run())
        await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
        world.guests.may_finish.set()
        world.platform.down = True
        world.platform.close_connections()
        await asyncio.sleep(OUTAGES[outage])
        job_id = world.platform.add_job(CHALLENGE)
        world.platform.down = False
        back = asyncio.get_running_loop().time()
        await until(lambda: world.platform.jobs[job_id].finished)
        assert asyncio.get_running_loop().time() - back <= 60
        engine.drain("the story is over")
        await running

    play(story, tmp_path)


@pytest.mark.robustness(10, "outage")
def test_the_results_of_several_jobs_wait_together_and_no_cvm_waits_for_them(tmp_path: Path) -> None:
    """Robustness 10: four jobs end while nobody answers; each is delivered once, within a minute."""

    async def story(world: World) -> None:
        world.platform.term = timedelta(minutes=2)
        engine = world.engine()
        running = asyncio.create_task(engine.run())
        await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
        jobs = [world.platform.add_job(CHALLENGE, timeout_s=7200) for _ in range(4)]
        await until(lambda: len(engine.parts.jobs.views()) == 4)
        await asyncio.sleep(30)
        world.platform.down = True
        world.guests.may_finish.set()
        await asyncio.sleep(OUTAGES["30 min"])
        assert {entry.job_id for entry in await world.store.outbox()} == set(jobs)
        assert not world.vmm.machines()
        world.platform.down = False
        back = asyncio.get_running_loop().time()
        await until(lambda: all(world.platform.jobs[job_id].finished for job_id in jobs))
        assert asyncio.get_running_loop().time() - back <= 60
        assert {world.platform.jobs[job_id].attempt for job_id in jobs} == {1}
        engine.drain("the story is over")
        await running

    play(story, tmp_path)
