"""A process that starts on the journal of another: what it holds, adopts and gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fleet_world import (
    LIMITS,
    PLAN,
    RESOURCES,
    MakeWorld,
    fleet_worlds,
    restarted,
)
from waiting import until

from platform_protocol.ids import JobId, VmName
from platform_protocol.session.messages import JobExecute
from platform_validator.cvm import errors
from platform_validator.cvm.fleet import Fleet
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.quota import Quota
from platform_validator.cvm.testing_guest import ScriptedGuest
from platform_validator.cvm.vmm import VmmUnavailable


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    async with fleet_worlds(tmp_path) as make:
        yield make


async def test_a_restart_holds_what_still_runs_until_it_is_given_up(make_world: MakeWorld) -> None:
    """Quota and ports are rebuilt from the journal; the sweep leaves what may yet be adopted."""
    world = await make_world()
    cvm = await world.boot()
    later = Quota(LIMITS)
    fleet = restarted(world, later)
    await fleet.restore()
    assert later.view().used == RESOURCES
    [view] = fleet.views()
    assert (view.name, view.challenge_id, view.stage) == (cvm.name, PLAN.challenge_id, "restored")
    await fleet.sweep()
    assert fleet.destroyer.names == set()
    fleet.destroy(cvm.name)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(fleet.run())
        await fleet.destroyer.finish()
        running.cancel()
    assert world.vmm.machines() == []
    assert later.view().cvms == 0
    assert fleet.views() == []


ORDER = JobOrder(JobId("job-1"), 1, PLAN.challenge_id, None, {}, None)


async def carried_on(fleet: Fleet, name: VmName) -> GuestResult | errors.CvmError:
    """Adopt a CVM and wait for the job's result, or for what ends it."""
    await fleet.restore()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(fleet.run())
        await until(lambda: fleet._tasks is not None)
        try:
            cvm = await fleet.adopt(name, PLAN)
            return await cvm.session.execute(
                ORDER,
                None,
                on_started=lambda _already: None,
                on_progress=lambda *_: None,
                on_log=lambda *_: None,
            )
        except errors.CvmError as error:
            return error
        finally:
            running.cancel()


async def test_a_running_job_is_adopted_by_a_later_process(make_world: MakeWorld) -> None:
    """The session is resumed with what the journal holds; the job runs once and its result arrives."""
    world = await make_world()
    finish = asyncio.Event()

    async def work(_guest: ScriptedGuest, order: JobExecute, _submission: bytes) -> dict[str, Any]:
        await finish.wait()
        return {"score": 0.25, "job": order.job_id}

    world.script.work = work
    cvm = await world.boot()
    first = asyncio.create_task(
        cvm.session.execute(
            ORDER, None, on_started=lambda _already: None, on_progress=lambda *_: None, on_log=lambda *_: None
        )
    )
    guest = world.vmm.machine(cvm.name).guest
    assert guest is not None
    await guest.until(lambda guest: len(guest.orders) == 1)
    cvm.session.close()
    with pytest.raises(errors.SessionLost):
        await first
    finish.set()
    result = await carried_on(restarted(world, Quota(LIMITS)), cvm.name)
    assert isinstance(result, GuestResult)
    assert result.result == {"score": 0.25, "job": "job-1"}
    assert (len(guest.orders), len(guest.configured)) == (1, 1)


async def test_what_receipts_tell_of_the_os_image_outlives_the_process(make_world: MakeWorld) -> None:
    """It was journaled before anything went in; who adopts the CVM tells the same."""
    world, told = await make_world(), '{"trust":"pinned_first_use"}'
    cvm = await world.boot()
    await world.store.vm_attested(cvm.name, attestation="none", vm_instance=None, os_image=told)
    cvm.session.close()
    fleet = restarted(world, Quota(LIMITS))
    await fleet.restore()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(fleet.run())
        await until(lambda: fleet._tasks is not None)
        assert (await fleet.adopt(cvm.name, PLAN)).os_image == told
        running.cancel()


async def test_a_vmm_that_restarts_ends_neither_a_boot_nor_an_adoption(make_world: MakeWorld) -> None:
    """Its VMs go on without it, as dstack's do: it is asked again until it is back."""
    world = await make_world()
    world.vmm.fail("get", VmmUnavailable("restarting"), times=3)
    cvm = await world.boot()
    cvm.session.close()
    world.vmm.fail("get", VmmUnavailable("restarting"), times=3)
    result = await carried_on(restarted(world, Quota(LIMITS)), cvm.name)
    assert isinstance(result, GuestResult)


async def test_what_rebooted_meanwhile_is_not_adopted(make_world: MakeWorld) -> None:
    """It does not know the session any more: whatever it would say is about another life."""
    world = await make_world()
    cvm = await world.boot()
    world.vmm.restart(cvm.name)
    fleet = restarted(world, Quota(LIMITS))
    found = await carried_on(fleet, cvm.name)
    assert isinstance(found, errors.SessionLost)
    assert "rebooted" in str(found)
    assert cvm.name in fleet.destroyer.names
