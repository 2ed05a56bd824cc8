"""Versions of a challenge come and go while jobs run: real git, real loops, the twins."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from job_house import CHALLENGE, OTHER, TOML, House, new_commit, tick

from platform_validator.store.records import InstanceState


async def test_a_new_commit_is_proved_beside_the_old_one_before_it_serves(house: House) -> None:
    """A new commit is proved beside the old one before it serves."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        old = house.challenges.views()[0].serving
        assert old is not None
        proof = asyncio.Event()
        house.fleet.next_boot(until=proof)
        house.publish(new_commit(house.folder, TOML + "# two\n"))
        while house.challenges.views()[0].candidate is None:
            await tick()
        assert house.challenges.views()[0].state is InstanceState.ACTIVE
        assert house.challenges.acquire(CHALLENGE) is not None
        proof.set()
        while (new := house.challenges.views()[0].serving) is None or new.commit == old.commit:
            await tick()
    assert new.commit != old.commit


async def test_an_old_instance_finishes_its_jobs_before_it_goes(house: House) -> None:
    """An old instance finishes its jobs before it goes."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        held = house.challenges.acquire(CHALLENGE)
        assert held is not None
        second = new_commit(house.folder, TOML + "# two\n")
        house.publish(second)
        while not (old := house.challenges.views()[0].old):
            await tick()
        assert (old[0].commit, old[0].state, old[0].jobs) == (held.commit, InstanceState.RECYCLING, 1)
        assert old[0].superseded_by is not None
        assert second in old[0].superseded_by
        states = {record.commit: record.state for record in await house.store.instances()}
        assert states == {held.commit: InstanceState.RECYCLING, second: InstanceState.ACTIVE}
        held.release()
        while house.challenges.views()[0].old:
            await tick()


async def test_a_broken_new_commit_leaves_the_old_one_serving(house: House) -> None:
    """A broken new commit leaves the old one serving."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.publish(new_commit(house.folder, "nonsense = [\n"))
        while (candidate := house.challenges.views()[0].candidate) is None or candidate.reason is None:
            await tick()
        assert "platform_toml_invalid" in candidate.reason
        assert house.challenges.views()[0].state is InstanceState.ACTIVE
        job_id = house.platform.add_job(CHALLENGE)
        await house.ended(job_id)
    assert house.platform.jobs[job_id].outcome == "succeeded"


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        (TOML.replace("cpu_cores = 1", "cpu_cores = 64"), "does_not_fit"),
        (TOML.replace("[cvm]", '[cvm]\nos_image = "none"'), "image_unknown"),
        (TOML.replace("[cvm]", '[cvm]\nruntime = "none"'), "runtime_unknown"),
        (TOML + "[env.KEY]\n", "env_missing"),
    ],
)
async def test_what_cannot_run_here_is_failed_with_its_reason(tmp_path: Path, toml: str, reason: str) -> None:
    """What cannot run here is failed with its reason."""
    house = House(tmp_path)
    house.publish(new_commit(tmp_path, toml))
    async with house.open():
        await house.state(InstanceState.FAILED)
        candidate = house.challenges.views()[0].candidate
    assert candidate is not None
    assert (candidate.reason or "").startswith(reason)


async def test_one_slow_challenge_delays_no_other(house: House) -> None:
    """One slow challenge delays no other."""
    stuck = asyncio.Event()
    house.fleet.next_boot(until=stuck)
    async with house.open():
        while not house.fleet.alive:
            await tick()
        house.publish(new_commit(house.folder, TOML), OTHER, "other")
        await house.state(InstanceState.ACTIVE, OTHER)
        assert house.challenges.active_ids() == [OTHER]


async def test_a_challenge_that_leaves_the_list_is_drained_and_removed(house: House) -> None:
    """A challenge that leaves the list is drained and removed."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        held = house.challenges.acquire(CHALLENGE)
        assert held is not None
        house.platform.remove_challenge(CHALLENGE)
        house.challenges.wake()
        await house.state(InstanceState.RECYCLING)
        held.release()
        while house.challenges.views():
            await tick()
        assert not await house.store.instances()
