"""The whole engine on virtual time, told to end in every phase of a job's life; twins outside."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
from tests.daemon.world import CHALLENGE, DRAIN, World, begun, play, undelivered, until

from platform_protocol.platform_messages import ReleaseReason
from platform_validator.cvm.vmm import VmmUnavailable
from platform_validator.daemon.engine import Drained, Engine


def seconds() -> float:
    """Virtual seconds."""
    return asyncio.get_running_loop().time()


def nothing_is_left(world: World, engine: Engine) -> None:
    """No VM, no share of the quota."""
    assert world.vmm.machines() == []
    assert engine.parts.quota.view().cvms == 0


@pytest.mark.parametrize("phase", ["booting", "running"])
@pytest.mark.robustness(2, "booting", "running")
def test_a_drain_lets_what_was_claimed_finish(tmp_path: Path, phase: str) -> None:
    """Robustness 2: SIGTERM while booting and while running; nothing more is claimed meanwhile."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, phase)
        engine.drain("signal")
        late = world.platform.add_job(CHALLENGE)
        await asyncio.sleep(60)
        assert not running.done()
        assert engine.phase == "draining"
        world.guests.may_boot.set()
        world.guests.may_finish.set()
        assert await running == Drained(0, 0)
        assert world.platform.jobs[job_id].status == "completed"
        assert world.platform.jobs[late].attempt == 0
        assert not await world.store.outbox()
        nothing_is_left(world, engine)

    play(story, tmp_path)


@pytest.mark.robustness(2, "submitting")
def test_a_drain_delivers_what_is_being_submitted(tmp_path: Path) -> None:
    """Robustness 2: SIGTERM while submitting; the Platform API comes back in time."""

    async def story(world: World) -> None:
        engine, running, job_id = await undelivered(world)
        engine.drain("signal")
        await asyncio.sleep(20)
        assert not running.done()
        world.platform.down = False
        assert await running == Drained(0, 0)
        assert world.platform.jobs[job_id].status == "completed"
        nothing_is_left(world, engine)

    play(story, tmp_path)


@pytest.mark.robustness(2, "submitting")
def test_a_result_that_a_drain_cannot_deliver_is_kept_for_the_next_start(tmp_path: Path) -> None:
    """Robustness 2: the Platform API stays away: the end does not wait for it for long."""

    async def story(world: World) -> None:
        engine, running, job_id = await undelivered(world)
        engine.drain("signal")
        asked = seconds()
        assert await running == Drained(1, 0)
        assert seconds() - asked < 120
        world.platform.down = False
        after = world.engine()
        again = asyncio.create_task(after.run())
        await until(lambda: world.platform.jobs[job_id].finished)
        after.drain("signal")
        assert await again == Drained(0, 0)
        assert world.platform.jobs[job_id].attempt == 1

    play(story, tmp_path)


@pytest.mark.parametrize("phase", ["booting", "running"])
@pytest.mark.robustness(2, "second-signal")
def test_a_second_signal_cancels_and_gives_back(tmp_path: Path, phase: str) -> None:
    """Robustness 2: at once, whatever the job does; others may claim it."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, phase)
        engine.drain("signal")
        await asyncio.sleep(5)
        engine.drain("signal")
        asked = seconds()
        assert await running == Drained(0, 0)
        assert seconds() - asked < 30
        job = world.platform.jobs[job_id]
        assert (job.status, job.releases) == ("pending", [ReleaseReason.DRAIN])
        nothing_is_left(world, engine)

    play(story, tmp_path)


@pytest.mark.robustness(2, "deadline")
def test_the_deadline_gives_back_what_has_not_finished(tmp_path: Path) -> None:
    """Robustness 2: a job that does not end in time is another validator's."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, "running")
        engine.drain("signal")
        asked = seconds()
        await running
        assert seconds() - asked < DRAIN.total_seconds() + 150
        job = world.platform.jobs[job_id]
        assert (job.status, job.releases) == ("pending", [ReleaseReason.DRAIN])
        nothing_is_left(world, engine)

    play(story, tmp_path)


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.robustness(2, "deadline")
def test_a_vm_that_cannot_be_removed_does_not_hold_the_end_up(tmp_path: Path, hangs: bool) -> None:
    """Robustness 2: the deadline passes with a stuck VM: it is left in the journal, for the next start."""

    async def story(world: World) -> None:
        engine, running, _ = await begun(world, "running")
        if hangs:
            world.vmm.stuck = asyncio.Event()
        world.vmm.fail("stop", VmmUnavailable("no answer"), times=10_000)
        engine.drain("signal")
        asked = seconds()
        assert await running == Drained(0, 1)
        [stuck] = [machine.spec.name for machine in world.vmm.machines()]
        assert DRAIN.total_seconds() <= seconds() - asked <= DRAIN.total_seconds() + 150
        world.vmm.heal()
        world.vmm.stuck = None
        after = world.engine()
        again = asyncio.create_task(after.run())
        await until(lambda: stuck not in {machine.spec.name for machine in world.vmm.machines()})
        after.drain("signal")
        assert await again == Drained(0, 0)
        nothing_is_left(world, after)

    play(story, tmp_path)


@pytest.mark.robustness(2, "recovering")
def test_told_to_end_while_the_journal_cannot_be_read(tmp_path: Path) -> None:
    """Robustness 2: SIGTERM while recovering: it ends, and nothing was begun."""

    async def story(world: World) -> None:
        world.store.fail = lambda _: True
        engine = world.engine()
        running = asyncio.create_task(engine.run())
        await until(lambda: engine.store_error is not None)
        engine.drain("signal")
        asked = seconds()
        assert await running == Drained(0, 0)
        assert seconds() - asked < 10
        assert engine.phase == "starting"
        assert "claim" not in world.platform.calls
        assert world.vmm.machines() == []

    play(story, tmp_path)


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.robustness(2, "recovering")
def test_told_to_end_before_a_running_job_is_adopted(tmp_path: Path, answers: bool) -> None:
    """Robustness 2: SIGTERM while recovering: what an earlier run left running is finished, or given back.

    Without the Platform API its lease cannot be renewed, and the deadline ends it.
    """

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, "running")
        journal = copy.deepcopy(world.store)
        # As if killed: nothing that the first run still does reaches anybody.
        world.platform.down = True
        world.vmm.fail("list", VmmUnavailable("killed"), times=10_000)
        engine.drain("signal")
        engine.drain("signal")
        await running
        world.vmm.heal()
        world.platform.down = not answers
        world.guests.may_finish.set()
        after = world.engine(journal)
        after.drain("signal")
        assert await after.run() == Drained(0, 0)
        job = world.platform.jobs[job_id]
        assert job.attempt == 1
        assert job.status == ("completed" if answers else "claimed")
        nothing_is_left(world, after)

    play(story, tmp_path)


@pytest.mark.robustness(17, "before-the-answer")
def test_the_operator_cancels_a_job_that_waits_for_its_lease(tmp_path: Path) -> None:
    """Robustness 17: after a restart, while the Platform API is away."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, "running")
        journal = copy.deepcopy(world.store)
        world.platform.down = True
        world.vmm.fail("list", VmmUnavailable("killed"), times=10_000)
        engine.drain("signal")
        engine.drain("signal")
        await running
        world.vmm.heal()
        after = world.engine(journal)
        again = asyncio.create_task(after.run())
        await until(lambda: after.phase == "running" and bool(after.parts.jobs.views()))
        assert after.cancel_job(job_id)
        await asyncio.sleep(60)
        world.platform.down = False
        await until(lambda: not after.parts.jobs.views())
        assert world.platform.jobs[job_id].releases == [ReleaseReason.OPERATOR]
        after.drain("signal")
        assert await again == Drained(0, 0)
        [record] = await journal.recent_jobs(10)
        assert (record.outcome, record.reason) == ("cancelled", "operator")
        nothing_is_left(world, after)

    play(story, tmp_path)


@pytest.mark.robustness(10, "nothing-answers")
def test_every_loop_turns_while_nothing_answers(tmp_path: Path) -> None:
    """Robustness 10: hours without the Platform API and the VMM starve no watchdog."""

    async def story(world: World) -> None:
        world.platform.down = True
        world.vmm.fail("list", VmmUnavailable("no answer"), times=100_000)
        engine = world.engine()
        running = asyncio.create_task(engine.run())
        for _ in range(4 * 60):
            await asyncio.sleep(60)
            assert engine.pulse.silent() == {}
        engine.drain("signal")
        assert await running == Drained(0, 0)

    play(story, tmp_path)


@pytest.mark.parametrize("loop", ["jobs", "outbox", "challenges"])
@pytest.mark.robustness(4, "watchdog")
def test_a_loop_that_is_stuck_is_noticed(tmp_path: Path, loop: str) -> None:
    """Robustness 4: it does not turn, and says so within minutes."""

    async def story(world: World) -> None:
        engine = world.engine()
        never = asyncio.Event()

        async def stuck(*_: object, **__: object) -> Any:
            await never.wait()

        target = {"jobs": "_pass", "outbox": "deliver", "challenges": "_look"}[loop]
        setattr(getattr(engine.parts, loop), target, stuck)
        running = asyncio.create_task(engine.run())
        await until(lambda: engine.pulse.silent() != {})
        assert list(engine.pulse.silent()) == [loop]
        assert seconds() < 300
        engine.drain("signal")
        await running

    play(story, tmp_path)
