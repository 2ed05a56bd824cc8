"""What a VMM does wrong while it creates and boots, by dstack's double: no CVM leaks, reasons are told."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import timedelta

import pytest
from tests.conformance.house import PATIENCE, VERSIONS, House, MakeHouse
from tests.dstack_double import Boot, Fault, behaviour
from waiting import until

from platform_validator.cvm import errors
from platform_validator.cvm.vmm import VmmUnavailable

UNSEEN = "11111111-1111-4111-8111-111111111111"
each_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.mark.robustness(18, "create-late")
@each_version
async def test_case_18_a_create_that_is_not_answered_is_found_by_its_name(
    make: MakeHouse, version: str
) -> None:
    """CreateVm was done and its answer lost: the one VM is used, and no second is made."""
    async with make(version) as one:
        one.double.faults.add("CreateVm", Fault(effects=1, silent=True))
        cvm = await one.boot()
        assert one.names() == [cvm.name]
        assert [method for method, _ in one.double.calls].count("CreateVm") == 1
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()


@pytest.mark.robustness(18, "create-late")
async def test_case_18_a_create_that_succeeds_after_it_was_given_up_is_swept(make: MakeHouse) -> None:
    """Nothing showed when we looked; what comes up later is ours by its exact name, and goes."""
    async with make("0.6.0") as one:
        one.double.faults.add("CreateVm", Fault(effects=1, after=1.5, silent=True))
        with pytest.raises(VmmUnavailable):
            await one.boot()
        await one.nothing_is_left()
        await until(lambda: len(one.names()) == 1)
        await one.fleet.sweep()
        await one.nothing_is_left()


@pytest.mark.robustness(18, "create-twice")
@each_version
async def test_case_18_a_create_that_succeeds_twice_leaves_neither(make: MakeHouse, version: str) -> None:
    """The request was repeated on its way: one of the two is used, and both go."""
    async with make(version) as one:
        one.double.faults.add("CreateVm", Fault(effects=2, cut=True))
        cvm = await one.boot()
        # The head refuses the second for its host port; before, QEMU finds out, and dstack restarts it.
        assert one.names() == [cvm.name] * (1 if version == "0.6.0" else 2)
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()


@pytest.mark.robustness(18, "never-shown")
@pytest.mark.parametrize("exists", [True, False])
async def test_case_18_an_id_that_status_never_shows_fails_the_boot(make: MakeHouse, exists: bool) -> None:
    """Whether there is a VM behind it or not: the boot fails, and the id is removed blindly."""
    async with make("0.6.0") as one:
        if exists:
            one.double.host.boots = lambda _: _hide_all(one)
        else:
            one.double.faults.add("CreateVm", Fault(status=200, body=json.dumps({"id": UNSEEN})))
        with pytest.raises(errors.BootFailed, match="no such VM"):
            await one.boot()
        await one.nothing_is_left()


def _hide_all(one: House) -> Boot:
    one.double.host.hidden |= set(one.double.host.machines)
    return Boot()


@pytest.mark.robustness(18, "vmm-restarts")
async def test_case_18_a_vmm_that_restarts_between_calls_costs_no_cvm(make: MakeHouse) -> None:
    """Away while the VM boots, then back as a newer version that no longer knows how far it is."""
    async with make("0.5.7") as one:
        one.serves = False
        async with asyncio.TaskGroup() as tasks:
            booting = tasks.create_task(one.boot())
            await until(lambda: "booting" in one.stages)
            await one.down()
            # Only what does not answer has an error.
            await until(lambda: one.fleet.hosts.status()[0].error is not None)
            one.double.host.behaviour = behaviour("0.6.0")
            await one.up()
            one.serves = True
        cvm = booting.result()
        await one.down()
        one.fleet.destroy(cvm.name)
        await until(lambda: any(view.tries for view in one.fleet.views()))
        await one.up()
        await one.nothing_is_left()


@pytest.mark.robustness(18, "sdk-silent")
@each_version
async def test_case_18_a_vm_that_runs_and_whose_sdk_never_answers_is_given_up(
    make: MakeHouse, version: str
) -> None:
    """`running` and `done` prove nothing: the boot's deadline ends it."""
    async with make(version, boot=timedelta(seconds=0.7)) as one:
        one.serves = False
        with pytest.raises(errors.BootTimedOut):
            await one.boot()
        await one.nothing_is_left()


@pytest.mark.robustness(18, "boot-error")
@each_version
async def test_case_18_a_boot_error_is_the_reason_that_is_told(make: MakeHouse, version: str) -> None:
    """In the guest's words."""
    async with make(version) as one:
        one.serves = False
        one.double.host.boots = lambda _: Boot(error="No KMS URLs are set")
        with pytest.raises(errors.BootFailed, match="No KMS URLs are set"):
            await one.boot()
        await one.nothing_is_left()


@pytest.mark.robustness(18, "restarts-itself")
@each_version
async def test_case_18_a_vm_that_exits_while_booting_is_not_left_to_be_restarted(
    make: MakeHouse, version: str
) -> None:
    """Dstack would restart it for ever: it is stopped first, which ends that, then removed."""
    async with make(version) as one:
        one.serves = False
        one.double.host.restart_after = 0.3
        one.double.host.boots = lambda _: Boot(exits=0.05, stderr="guest panicked")
        with pytest.raises(errors.BootFailed, match="guest panicked"):
            await one.boot()
        await one.nothing_is_left()
        calls = [method for method, _ in one.double.calls]
        assert calls.index("StopVm") < calls.index("RemoveVm")
        starts = one.double.host.starts
        at = time.monotonic()
        one.double.host.clock = lambda: at + 3600
        one.double.host.advance()
        assert one.double.host.starts == starts


@pytest.mark.robustness(18, "restarts-itself")
@each_version
async def test_case_18_a_cvm_that_was_restarted_under_a_job_is_lost(make: MakeHouse, version: str) -> None:
    """What answers afterwards is another boot: no job goes on in it."""
    async with make(version) as one:
        one.double.host.restart_after = 0.05
        cvm = await one.boot()
        [machine] = one.double.host.machines.values()
        machine.boot = Boot(exits=0.0)
        await until(lambda: machine.boots > 1)
        async with asyncio.timeout(PATIENCE):
            assert isinstance(await cvm.session.lost(), errors.SessionLost)
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()
