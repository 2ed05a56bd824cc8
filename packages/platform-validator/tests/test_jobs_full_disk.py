"""The disk fills up at a write of a job's life: no more is claimed, and afterwards all goes on by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_house import CHALLENGE, TOML, House, new_commit, tick

from platform_validator.store.records import InstanceState

READS = {
    "identity",
    "job",
    "open_jobs",
    "recent_jobs",
    "outbox",
    "vm",
    "open_vms",
    "instances",
    "value",
    "values",
}


class FillingDisk:
    """Full from the first write of that name on, until there is room again."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.full = False
        self.room = False
        self.refused = 0
        self.asked: set[str] = set()

    def __call__(self, name: str) -> bool:
        if name in READS:
            return False
        self.asked.add(name)
        self.full = not self.room and (self.full or name == self.at)
        self.refused += self.full
        return self.full


WRITES = [
    "open_claim",
    "claim_granted",
    "vm_assigned",
    "intend_vm",
    "vm_created",
    "vm_attested",
    "advance",
    "store_result",
    "outbox_delivered",
    "vm_phase",
]


async def test_these_are_the_writes_of_a_job_s_life(tmp_path: Path) -> None:
    """Robustness 6: with its CVM, and the ready one that takes its place."""
    house, disk = House(tmp_path), FillingDisk("none of them")
    house.publish(new_commit(tmp_path, TOML))
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.store.fail = disk
        await house.ended(house.platform.add_job(CHALLENGE))
        await house.all_gone()
    assert disk.asked == set(WRITES)


@pytest.mark.parametrize("at", WRITES)
@pytest.mark.robustness(6, "full", "claiming-stops", "recovers")
async def test_a_disk_that_fills_up_stops_the_claiming_and_loses_nothing(tmp_path: Path, at: str) -> None:
    """Robustness 6: at every write; each job is delivered once when there is room, without a restart."""
    house, disk = House(tmp_path), FillingDisk(at)
    house.publish(new_commit(tmp_path, TOML))
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.store.fail = disk
        jobs = [house.platform.add_job(CHALLENGE)]
        while disk.refused < 3:
            await tick()
        claims = house.platform.calls.count("claim")
        jobs += [house.platform.add_job(CHALLENGE) for _ in range(3)]
        refused = disk.refused
        while disk.refused < refused + 3:
            await tick()
        assert house.platform.calls.count("claim") == claims
        disk.room = True
        for job_id in jobs:
            await house.ended(job_id)
        while await house.store.open_jobs() or await house.store.outbox():
            await tick()
        await house.all_gone()
    assert [house.platform.jobs[job_id].outcome for job_id in jobs] == ["succeeded"] * 4
    assert house.quota.view().cvms == sum(
        view.serving.ready for view in house.challenges.views() if view.serving
    )
