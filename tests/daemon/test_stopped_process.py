"""The whole engine on virtual time, stopped for longer than its lease's term: SIGSTOP, a sleeping machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from tests.daemon.world import CHALLENGE, World, play, until
from tests.simulation.virtual import VirtualLoop

from platform_protocol.ids import ClaimId, JobId
from platform_validator.daemon.engine import Engine

TERM = timedelta(minutes=2)


@asynccontextmanager
async def stopped(world: World) -> AsyncIterator[tuple[Engine, JobId]]:
    """A job runs; its result is there in the instant in which the process runs again after twice the term."""
    world.platform.term = TERM
    engine = world.engine()
    running = asyncio.create_task(engine.run())
    await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
    job_id = world.platform.add_job(CHALLENGE)
    await world.guests.running.wait()
    await asyncio.sleep(0)
    world.platform.calls.clear()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.now += 2 * TERM.total_seconds()
    world.guests.may_finish.set()
    yield engine, job_id
    engine.drain("the story is over")
    await running


@pytest.mark.robustness(3, "still-ours")
def test_a_result_that_comes_out_of_a_gap_waits_until_the_lease_is_renewed(tmp_path: Path) -> None:
    """Robustness 3: nobody claimed it meanwhile: renewed first, then stored and submitted."""

    async def story(world: World) -> None:
        async with stopped(world) as (_, job_id):
            await until(lambda: world.platform.jobs[job_id].finished)
            about_it = [call for call in world.platform.calls if call in {"renew", "submit_result"}]
            assert about_it[:2] == ["renew", "submit_result"]
            assert world.platform.jobs[job_id].status == "completed"

    play(story, tmp_path)


@pytest.mark.robustness(3, "lost")
def test_after_a_gap_the_loss_is_noticed_before_anything_is_submitted(tmp_path: Path) -> None:
    """Robustness 3: another validator has the job: nothing is stored and nothing submitted for it."""

    async def story(world: World) -> None:
        async with stopped(world) as (engine, job_id):
            await world.platform.client(hotkey="another").claim(job_id, ClaimId("theirs"))
            await until(lambda: not engine.parts.jobs.views())
            assert "submit_result" not in world.platform.calls
            assert not await world.store.outbox()
            [record] = [each for each in await world.store.recent_jobs(10) if each.job_id == job_id]
            assert (record.outcome, record.reason) == ("lease_lost", "lease_lost")
            assert world.platform.jobs[job_id].attempt == 2

    play(story, tmp_path)


@pytest.mark.robustness(3, "still-ours")
def test_after_a_gap_silence_is_no_answer(tmp_path: Path) -> None:
    """The Platform API is away as well: the result waits in the CVM; its first answer lets it go on."""

    async def story(world: World) -> None:
        world_down_for = 300.0
        async with stopped(world) as (engine, job_id):
            world.platform.down = True
            await asyncio.sleep(world_down_for)
            assert not await world.store.outbox()
            assert [view.job_id for view in engine.parts.jobs.views()] == [job_id]
            world.platform.down = False
            await until(lambda: world.platform.jobs[job_id].finished)
            job = world.platform.jobs[job_id]
            assert (job.status, job.attempt) == ("completed", 1)

    play(story, tmp_path)


def test_in_an_outage_without_a_gap_a_result_is_stored_at_once(tmp_path: Path) -> None:
    """The questions were asked and stayed unanswered: that is no gap, and a result is made durable."""

    async def story(world: World) -> None:
        world.platform.term = TERM
        engine = world.engine()
        running = asyncio.create_task(engine.run())
        await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
        job_id = world.platform.add_job(CHALLENGE)
        await world.guests.running.wait()
        world.platform.down = True
        await asyncio.sleep(3 * TERM.total_seconds())
        world.guests.may_finish.set()
        await asyncio.sleep(1)
        assert [entry.job_id for entry in await world.store.outbox()] == [job_id]
        world.platform.down = False
        await until(lambda: world.platform.jobs[job_id].finished)
        engine.drain("the story is over")
        await running

    play(story, tmp_path)
