"""Robustness 16 and 17: who claims, who cancels, and what comes first."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.daemon.world import CHALLENGE, World, begun, play, undelivered, until

from platform_protocol.ids import ClaimId, JobId
from platform_protocol.notifications import JobCancelled, NewJob
from platform_validator.daemon.engine import Drained, Engine


async def started(world: World) -> tuple[Engine, asyncio.Task[Drained]]:
    """An engine whose challenge is Active, and whose trial CVM is gone."""
    engine = world.engine()
    running = asyncio.create_task(engine.run())
    await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
    await until(lambda: engine.notifications.view().connected)
    return engine, running


async def ended(engine: Engine, running: asyncio.Task[Drained], world: World) -> None:
    """Drained, with nothing left."""
    engine.drain("the story is over")
    await running
    assert world.vmm.machines() == []
    assert engine.parts.quota.view().cvms == 0
    assert not await world.store.open_jobs()


@pytest.mark.robustness(16, "push-and-poll")
def test_push_and_poll_claim_one_job_once(tmp_path: Path) -> None:
    """Robustness 16: pushed again and again while the poll finds it: one claim, one CVM."""

    async def story(world: World) -> None:
        engine, running = await started(world)
        world.platform.calls.clear()
        job_id = world.platform.add_job(CHALLENGE)
        for seq in range(50):
            world.platform.push_hint(NewJob(seq=seq, job_id=job_id, challenge_id=CHALLENGE))
            engine.parts.jobs.wake("local")
            await asyncio.sleep(0.01)
        await world.guests.running.wait()
        assert world.platform.calls.count("claim") == 1
        assert len(world.vmm.machines()) == 1
        world.guests.may_finish.set()
        await until(lambda: world.platform.jobs[job_id].finished)
        assert world.platform.jobs[job_id].attempt == 1
        await ended(engine, running, world)

    play(story, tmp_path)


@pytest.mark.robustness(16, "two-validators")
def test_of_two_validators_one_gets_the_job_and_the_other_goes_on(tmp_path: Path) -> None:
    """Robustness 16: the one that comes second has a 409, no CVM, and takes the next job."""

    async def story(world: World) -> None:
        engine, running = await started(world)
        other = world.platform.client(hotkey="another")
        job_id = world.platform.add_job(CHALLENGE)
        await other.claim(job_id, ClaimId("theirs"))
        second = world.platform.add_job(CHALLENGE)
        world.platform.push_hint(NewJob(seq=1, job_id=job_id, challenge_id=CHALLENGE))
        await world.guests.running.wait()
        assert [view.job_id for view in engine.parts.jobs.views()] == [second]
        world.guests.may_finish.set()
        await until(lambda: world.platform.jobs[second].finished)
        assert world.platform.jobs[job_id].holder == ("another", ClaimId("theirs"))
        await ended(engine, running, world)

    play(story, tmp_path)


@pytest.mark.robustness(16, "draining")
def test_a_claim_that_is_under_way_when_the_drain_begins_is_finished(tmp_path: Path) -> None:
    """Robustness 16: what was asked for is run to its end; nothing is asked for after that."""

    async def story(world: World) -> None:
        engine, running = await started(world)
        world.platform.fail_next("claim", after=True)
        job_id = world.platform.add_job(CHALLENGE)
        await until(lambda: "claim" in world.platform.calls)
        engine.drain("signal")
        late = world.platform.add_job(CHALLENGE)
        world.guests.may_finish.set()
        assert await running == Drained(0, 0)
        job = world.platform.jobs[job_id]
        assert (job.status, job.attempt) == ("completed", 1)
        assert world.platform.jobs[late].attempt == 0

    play(story, tmp_path)


@pytest.mark.robustness(17, "before-the-answer")
def test_a_job_cancelled_before_its_claim_was_answered_runs_nowhere(tmp_path: Path) -> None:
    """Robustness 17: the lost answer is asked for again, and the answer is now a no."""

    async def story(world: World) -> None:
        engine, running = await started(world)
        world.platform.fail_next("claim", after=True)
        job_id = world.platform.add_job(CHALLENGE)
        await until(lambda: "claim" in world.platform.calls)
        world.platform.cancel_job(job_id)
        await asyncio.sleep(60)
        assert not world.guests.running.is_set()
        assert world.platform.jobs[job_id].outcome == "cancelled"
        assert "submit_result" not in world.platform.calls
        await ended(engine, running, world)

    play(story, tmp_path)


@pytest.mark.robustness(17, "booting", "twice")
@pytest.mark.parametrize("phase", ["booting", "running"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_cancelled_job_ends_at_once_and_is_submitted_by_nobody(
    tmp_path: Path, phase: str, times: int
) -> None:
    """Robustness 17: while booting and while running, once and twice: its CVM goes, the daemon goes on."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, phase)
        await until(lambda: engine.notifications.view().connected)
        for _ in range(times):
            world.platform.cancel_job(job_id)
        await until(lambda: not engine.parts.jobs.views())
        await until(lambda: not world.vmm.machines())
        assert "submit_result" not in world.platform.calls
        assert "release" not in world.platform.calls
        [record] = [each for each in await world.store.recent_jobs(9) if each.job_id == job_id]
        assert (record.outcome, record.reason) == ("cancelled", "job_cancelled")
        if phase == "running":
            assert world.guests.cancelled == [job_id]
        await ended(engine, running, world)

    play(story, tmp_path)


@pytest.mark.robustness(17, "after-the-result")
def test_a_cancellation_after_the_result_was_stored_is_the_api_s_to_decide(tmp_path: Path) -> None:
    """Robustness 17: the stored result is sent all the same; the refusal of it is the end of it."""

    async def story(world: World) -> None:
        engine, running, job_id = await undelivered(world)
        world.platform.down = False
        world.platform.cancel_job(job_id)
        await until(lambda: engine.parts.outbox.depth == 0)
        assert "submit_result" in world.platform.calls
        [record] = [each for each in await world.store.recent_jobs(9) if each.job_id == job_id]
        assert record.reason == "job_cancelled"
        assert world.platform.jobs[job_id].result is None
        await ended(engine, running, world)

    play(story, tmp_path)


@pytest.mark.robustness(17, "unknown")
def test_a_cancellation_of_an_unknown_job_is_nothing(tmp_path: Path) -> None:
    """Robustness 17: pushed for a job that was never here, and for one that has long ended."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, "running")
        world.guests.may_finish.set()
        await until(lambda: world.platform.jobs[job_id].finished)
        for seq, unknown in enumerate((JobId("../../etc"), job_id, JobId("\0"), JobId("😀" * 2500))):
            world.platform.push_hint(JobCancelled(seq=seq, job_id=unknown))
        await asyncio.sleep(5)
        assert world.platform.jobs[job_id].status == "completed"
        await ended(engine, running, world)

    play(story, tmp_path)
