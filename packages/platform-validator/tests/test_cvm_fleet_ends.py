"""How CVMs end: destroyed until they are gone, swept, reclaimed; those of others are left alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from fleet_world import (
    COMPOSE,
    RESOURCES,
    MakeWorld,
    fleet_worlds,
)
from ports import free_range
from waiting import until

from platform_protocol.ids import VmName
from platform_protocol.user_config import UserConfig
from platform_validator.cvm.destroyer import Destroyer
from platform_validator.cvm.memory import IMAGE
from platform_validator.cvm.vmm import VmmRefused, VmmUnavailable, VmSpec, VmState
from platform_validator.store.records import VmPhase


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    async with fleet_worlds(tmp_path) as make:
        yield make


async def test_a_create_that_was_done_but_not_answered_is_found_by_its_name(make_world: MakeWorld) -> None:
    """CreateVm is not idempotent: the VM of exactly that name is taken, and no second one is made."""
    world = await make_world()
    world.vmm.fail("create", VmmUnavailable("timed out"), after=True)
    cvm = await world.boot()
    assert world.vmm.calls.count("create") == 1
    assert world.vmm.machine(cvm.name).id == cvm.vm_id


async def test_a_create_that_is_done_after_all_was_given_up_is_swept(make_world: MakeWorld) -> None:
    """The journal says gone, the VMM shows it: ours by exact name, so it is destroyed again."""
    world = await make_world()
    world.vmm.fail("create", VmmUnavailable("timed out"))
    with pytest.raises(VmmUnavailable):
        await world.boot()
    await world.nothing_is_left()
    world.vmm.make_late(world.vmm.asked[0])
    await world.fleet.sweep()
    await world.nothing_is_left()
    assert world.fleet.strays == ()


def a_spec(name: VmName) -> VmSpec:
    """A VM of that name, as a CreateVm from before would make it."""
    config = UserConfig(
        vm=name,
        launch_secret=UserConfig.encode_secret(b"s" * 32),
        validator_base_url="http://10.0.2.2:18080",
        proxy_url=None,
        max_lifetime_s=1,
        hard_lifetime_s=1,
    )
    return VmSpec(
        name=name,
        image=IMAGE,
        compose=COMPOSE,
        user_config=config.model_dump_json(),
        resources=RESOURCES,
        host_port=0,
        guest_port=10000,
        tee=False,
        simulated_tee=False,
    )


async def test_destruction_is_tried_for_ever_and_holds_the_share_until_the_vm_is_gone(
    make_world: MakeWorld,
) -> None:
    """Refusals and silence are counted and shown; the reservation comes back only with the confirmation."""
    world = await make_world()
    cvm = await world.boot()
    world.vmm.fail("stop", VmmUnavailable("no answer"), times=3)
    world.vmm.fail("remove", VmmRefused("VM is running, stop it first"), times=2)
    world.vmm.removes_at_once = False
    world.fleet.destroy(cvm.name)
    world.fleet.destroy(cvm.name)
    await until(lambda: any(machine.state is VmState.REMOVING for machine in world.vmm.machines()))
    [view] = world.fleet.views()
    assert (view.stage, view.tries) == ("destroying", 5)
    assert "stop it first" in str(view.last_error)
    assert world.quota.view().cvms == 1
    world.vmm.finish_removals()
    await world.nothing_is_left()


async def test_a_vm_that_somebody_else_removed_is_gone(make_world: MakeWorld) -> None:
    """Not found is what was wanted."""
    world = await make_world()
    cvm = await world.boot()
    world.vmm.vanish(cvm.name)
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()


async def test_foreign_vms_survive_the_sweep(make_world: MakeWorld) -> None:
    """Also one whose name begins like ours, and one with our state id that the journal does not know."""
    world = await make_world()
    names = [VmName("somebody-elses"), VmName("pv-0123456789-restored"), VmName("pv-0123456789x")]
    low, _ = free_range(3)
    for number, name in enumerate(names):
        world.vmm.make_late(replace(a_spec(name), host_port=low + number))
    await world.fleet.sweep()
    assert [machine.spec.name for machine in world.vmm.machines()] == names
    assert world.fleet.strays == ("pv-0123456789-restored",)


async def test_a_stray_is_destroyed_when_the_operator_names_it(make_world: MakeWorld) -> None:
    """Only what is a stray now: neither a name that was made up, nor a VM of somebody else's."""
    world = await make_world()
    stray, foreign = VmName("pv-0123456789-restored"), VmName("pv-9999999999-anothers")
    ours = await world.boot()
    low, _ = free_range(3)
    for number, name in enumerate((stray, foreign)):
        world.vmm.make_late(replace(a_spec(name), host_port=low + number))
    assert await world.fleet.reclaim_strays([stray, foreign, ours.name, VmName("made-up")]) == [stray]
    await world.fleet.destroyer.finish()
    assert {machine.spec.name for machine in world.vmm.machines()} == {foreign, ours.name}
    await world.fleet.sweep()
    assert world.fleet.strays == ()


async def test_a_cvm_past_its_hard_deadline_is_destroyed_though_it_is_held(make_world: MakeWorld) -> None:
    """While the validator lives, no CVM outlives its record."""
    world = await make_world()
    await world.boot()
    await world.fleet.sweep()
    assert len(world.vmm.machines()) == 1
    world.clock.ahead = timedelta(hours=2)
    await world.fleet.sweep()
    await world.nothing_is_left()


async def test_destruction_that_was_interrupted_goes_on(make_world: MakeWorld) -> None:
    """A loop that died and is run again loses nothing that was given up before."""
    world = await make_world()
    cvm = await world.boot()
    gone: list[VmName] = []
    destroyer = Destroyer(hosts=world.fleet.hosts, store=world.store, clock=world.clock, on_gone=gone.append)
    world.vmm.removes_at_once = False
    destroyer.give(cvm.name)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(destroyer.run())
        await until(lambda: world.vmm.machines()[0].state is VmState.REMOVING)
        first.cancel()
    world.vmm.finish_removals()
    async with asyncio.TaskGroup() as group:
        second = group.create_task(destroyer.run())
        await destroyer.finish()
        second.cancel()
    assert gone == [cvm.name]
    assert (await world.store.vm(cvm.name)).phase is VmPhase.GONE


async def test_a_cvm_given_up_twice_in_its_life_is_destroyed_twice(make_world: MakeWorld) -> None:
    """It was gone, a late create brought it back, and it is given up again."""
    world = await make_world()
    cvm = await world.boot()
    for _ in range(2):
        world.fleet.destroy(cvm.name)
        await world.nothing_is_left()
        world.vmm.make_late(world.vmm.asked[0])
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()
