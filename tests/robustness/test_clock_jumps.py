"""Robustness 5: the wall clock jumps an hour either way, in each phase of a job."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from tests.daemon.world import World, begun, play, until

from platform_validator.cvm.fleet import SWEEP


@pytest.mark.robustness(5, "jump")
@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.parametrize("phase", ["booting", "running"])
def test_a_jump_of_the_wall_clock_costs_a_job_nothing(tmp_path: Path, phase: str, hours: int) -> None:
    """Robustness 5: its lease, its time and its CVM are counted on clocks that do not jump."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, phase)
        world.clock.jump(timedelta(hours=hours))
        sweeps = 3 * SWEEP.total_seconds()
        await world.clock.sleep(sweeps)
        world.guests.may_boot.set()
        await world.guests.running.wait()
        await world.clock.sleep(sweeps)
        world.guests.may_finish.set()
        await until(lambda: world.platform.jobs[job_id].finished)
        job = world.platform.jobs[job_id]
        assert (job.status, job.attempt, job.releases) == ("completed", 1, [])
        engine.drain("the story is over")
        await running
        assert not world.vmm.machines()

    play(story, tmp_path)
