"""What a VMM does wrong while it removes, by dstack's double: only absence counts, others stay."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest
from tests.conformance.house import STATE_ID, VERSIONS, House, MakeHouse
from tests.dstack_double import Fault
from waiting import until

from platform_protocol.ids import VmName
from platform_validator.cvm import errors

each_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.mark.robustness(19, "remove-hangs", "remove-fails", "remove-not-found")
@pytest.mark.parametrize(
    "fault",
    [
        Fault(silent=True),
        Fault(effects=1, silent=True),
        Fault(cut=True),
        Fault(status=500, body="<html>"),
        Fault(error="Failed to stop supervisor process"),
        Fault(error="VM not found"),
        Fault(effects=1, error="VM not found"),
    ],
    ids=["hangs", "hangs-and-is-done", "is-cut", "panics", "fails", "not-found", "not-found-and-is-done"],
)
@each_version
async def test_case_19_a_removal_is_asked_for_until_the_vm_is_gone(
    make: MakeHouse, version: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever RemoveVm says, only the VM's absence ends it; the quota is held until then."""
    async with make(version) as one:
        cvm = await one.boot()
        monkeypatch.setattr("platform_validator.cvm.dstack.wire.CALL", 0.5)
        one.double.faults.add("RemoveVm", fault, times=2)
        one.fleet.destroy(cvm.name)
        await until(lambda: not one.names() or any(view.tries for view in one.fleet.views()))
        assert one.quota.view().cvms == 1 or not one.names()
        await one.nothing_is_left()


@pytest.mark.robustness(19, "removing-for-hours")
@pytest.mark.parametrize("version", ["0.5.7", "0.5.11", "0.6.0"])
async def test_case_19_a_vm_that_is_removing_for_hours_is_shown_and_holds_its_share(
    make: MakeHouse, version: str
) -> None:
    """It is asked for again and again, others boot meanwhile, and it ends when it is gone."""
    async with make(version) as one:
        cvm = await one.boot()
        one.double.host.removal = None
        one.fleet.destroy(cvm.name)
        await until(lambda: any(view.tries >= 2 for view in one.fleet.views()))
        [view] = one.fleet.views()
        assert view.stage == "destroying"
        assert view.last_error
        assert one.quota.view().cvms == 1
        other = await one.boot()
        one.double.host.removal = 0.0
        one.fleet.destroy(other.name)
        await one.nothing_is_left()


@pytest.mark.robustness(19, "deleted-by-others")
@each_version
async def test_case_19_a_vm_that_somebody_else_deleted_is_gone(make: MakeHouse, version: str) -> None:
    """While it was ready, and while it boots: no error is left, and nothing waits."""
    async with make(version) as one:
        cvm = await one.boot()
        one.double.host.machines.clear()
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()
        one.serves = False
        async with asyncio.TaskGroup() as tasks:
            booting = tasks.create_task(_outcome(one))
            await until(lambda: one.stages[-1] == "booting")
            one.double.host.machines.clear()
        assert isinstance(booting.result(), errors.BootFailed)
        await one.nothing_is_left()


async def _outcome(one: House) -> BaseException | None:
    try:
        await one.boot()
    except errors.CvmError as error:
        return error
    return None


@pytest.mark.robustness(19, "foreign-name")
@each_version
async def test_case_19_foreign_vms_with_names_like_ours_survive(make: MakeHouse, version: str) -> None:
    """Another validator's, one of our state id from a backup, and one that begins with a name of ours."""
    async with make(version) as one:
        cvm = await one.boot()
        backup = f"pv-{STATE_ID}-{uuid4()}"
        foreign = [f"pv-fedcba9876-{uuid4()}", backup, f"{cvm.name}-2", f"pv-{STATE_ID}", f"x{cvm.name}"]
        for name in foreign:
            one.create(name=name)
        await one.fleet.sweep()
        one.fleet.destroy(cvm.name)
        await one.settled()
        await one.fleet.sweep()
        await one.settled()
        assert sorted(one.names()) == sorted(foreign)
        assert set(one.fleet.strays) == {VmName(backup), VmName(f"{cvm.name}-2")}
