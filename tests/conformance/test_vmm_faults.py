"""What a VMM does wrong, by dstack's double: no CVM leaks, none of others is touched, and reasons are told.

Levels below Tee need v0.5.6; v0.5.6 still removes at once, v0.5.7 no more, and the head refuses taken ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tests.conformance.house import PATIENCE, PLAN, STATE_ID, House, house
from tests.dstack_double import Boot, Fault, behaviour
from tests.dstack_double.guest import DISK_USED, RECEIVED, SENT, USED
from tests.dstack_double.server import IMAGE

from platform_protocol.ids import VmName
from platform_validator.cvm import errors
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.vmm import VmmUnavailable

MakeHouse = Callable[..., contextlib.AbstractAsyncContextManager[House]]
VERSIONS = ("0.5.6", "0.5.7", "0.6.0")
each_version = pytest.mark.parametrize("version", VERSIONS)
UNSEEN = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of minutes pass in tenths of a second."""
    monkeypatch.setattr("platform_validator.cvm.dstack.client._CREATE", 0.4)
    monkeypatch.setattr("platform_validator.cvm.dstack.wire.CALL", 5.0)
    monkeypatch.setattr("platform_validator.cvm.destroyer._PATIENCE", 0.4)


@pytest.fixture
def make(tmp_path: Path) -> MakeHouse:
    @contextlib.asynccontextmanager
    async def made(version: str, **rules: Any) -> AsyncIterator[House]:
        async with house(tmp_path, version, **rules) as one:
            yield one

    return made


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.01)


# What CVMs use


@each_version
async def test_what_a_cvm_uses_is_read_from_its_guest_agent(make: MakeHouse, version: str) -> None:
    """A disk counts once, and so does what goes through docker's bridge; dstack counts no CPU time."""
    async with make(version, sample_every=timedelta(seconds=5)) as one:
        cvm = await one.boot()
        used = await one.fleet.usage(cvm.name)
        assert used is not None
        assert (used.memory_bytes, used.disk_bytes, used.network_bytes) == (USED, DISK_USED, RECEIVED + SENT)
        assert (used.cpu_time_ms, used.cpu_percent) == (None, None)
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()


@each_version
@pytest.mark.parametrize(
    "fault",
    [
        Fault(silent=True),
        Fault(cut=True),
        Fault(error="guest agent is not reachable"),
        Fault(status=200, body="[" * 100_000),
        Fault(status=200, body=" " * 300_000),
    ],
)
async def test_a_guest_agent_that_cannot_be_asked_ends_nothing(
    make: MakeHouse, version: str, fault: Fault
) -> None:
    """Silent, cut off, away, nonsense or too much: not known, within a moment, and the CVM goes on."""
    async with make(version, sample_every=timedelta(seconds=5)) as one:
        one.double.faults.always("SysInfo", fault)
        cvm = await one.boot()
        async with asyncio.timeout(PATIENCE):
            assert await one.fleet.usage(cvm.name) is None
        await cvm.session.confirm()
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()


# 18: creating and booting


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


# 19: removing


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


# 20: no room


@pytest.mark.robustness(20, "cpu", "memory", "cid-pool")
@pytest.mark.parametrize(
    "text",
    [
        "not enough vCPU: 1 wanted, 0 free",
        "Cannot allocate memory (os error 12)",
        "Insufficient hugepages on NUMA node 0",
        "No CID available in the pool",
        "CID pool exhausted",
    ],
)
@pytest.mark.parametrize("version", ["0.5.6", "0.6.0"])
async def test_case_20_a_vmm_without_room_is_no_failure_of_the_job(
    make: MakeHouse, version: str, text: str
) -> None:
    """CPU, memory and the CID pool: NoCapacity, which gives the job back; the next try boots."""
    async with make(version) as one:
        one.double.faults.add("CreateVm", Fault(error=text))
        with pytest.raises(errors.NoCapacity):
            await one.boot()
        await one.nothing_is_left()
        cvm = await one.boot()
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()


@pytest.mark.robustness(20, "memory")
@each_version
async def test_case_20_a_vm_that_dies_at_its_start_for_want_of_memory_is_no_failure(
    make: MakeHouse, version: str
) -> None:
    """QEMU says so in the log of its process; the guest's console, which a guest writes, does not count."""
    async with make(version) as one:
        text = "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory"
        one.double.host.boots = lambda _: Boot(exits=0.0, stderr=text)
        with pytest.raises(errors.NoCapacity, match="cannot set up guest memory"):
            await one.boot()
        await one.nothing_is_left()


@pytest.mark.robustness(20, "gpu")
@each_version
async def test_case_20_gpus_are_given_once_and_a_lack_of_them_is_no_failure(
    make: MakeHouse, version: str
) -> None:
    """Two are free, a foreign VM has one more that is not running: two boot at once, a third does not."""
    plan = _with_gpus(1)
    async with make(version) as one:
        one.double.host.gpus = ("18:00.0", "2a:00.0", "3a:00.0")
        listed = {"attach_mode": "listed", "gpus": [{"slot": "2a:00.0"}]}
        foreign = one.create(gpus=listed, stopped=True, user_config="")
        async with asyncio.TaskGroup() as tasks:
            booting = [tasks.create_task(one.boot(plan)) for _ in range(2)]
        with pytest.raises(errors.NoCapacity, match="gpu"):
            await one.boot(plan)
        shown = [m.configuration["gpus"]["gpus"] for m in one.double.host.machines.values() if m.running]
        assert sorted(slots[0]["slot"] for slots in shown) == ["18:00.0", "3a:00.0"]
        for task in booting:
            one.fleet.destroy(task.result().name)
        await one.settled()
        assert list(one.double.host.machines) == [foreign]


@pytest.mark.robustness(20, "gpu")
@each_version
async def test_case_20_gpus_where_there_are_none_are_never_silently_left_out(
    make: MakeHouse, version: str
) -> None:
    """A node with GPUs off: no VM is made without them."""
    async with make(version) as one:
        with pytest.raises(errors.NoCapacity, match="gpu"):
            await one.boot(_with_gpus(2))
        assert "CreateVm" not in [method for method, _ in one.double.calls]
        await one.nothing_is_left()


def _with_gpus(count: int) -> CvmPlan:
    return replace(PLAN, resources=PLAN.resources.model_copy(update={"gpu_count": count}))


@pytest.mark.robustness(20, "host-port")
@each_version
async def test_case_20_a_host_port_of_another_vm_is_passed_over(make: MakeHouse, version: str) -> None:
    """A foreign VM maps the first ports of our range: the next one is taken."""
    async with make(version) as one:
        first = await one.boot()
        [machine] = one.double.host.machines.values()
        port = machine.configuration["ports"][0]["host_port"]
        one.fleet.destroy(first.name)
        await one.settled()
        taken = [{"protocol": "tcp", "host_port": port + 1, "vm_port": 1, "host_address": ""}]
        foreign = one.create(ports=taken, user_config="", image=IMAGE)
        cvm = await one.boot()
        made = next(m for m in one.double.host.machines.values() if m.configuration["name"] == cvm.name)
        assert made.configuration["ports"][0]["host_port"] == port + 2
        one.fleet.destroy(cvm.name)
        await one.settled()
        assert list(one.double.host.machines) == [foreign]


@pytest.mark.robustness(20, "host-port")
@each_version
async def test_case_20_a_host_port_of_another_process_is_passed_over(make: MakeHouse, version: str) -> None:
    """QEMU finds out when it starts: another port is tried; with none left it is no failure of the job."""
    text = "Could not set up host forwarding rule 'tcp:127.0.0.1:10000-:10000'"
    async with make(version) as one:
        dying = iter([Boot(exits=0.0, stderr=text)])
        one.double.host.boots = lambda _: next(dying, Boot())
        cvm = await one.boot()
        assert one.double.host.starts == 2
        one.fleet.destroy(cvm.name)
        await one.nothing_is_left()
        one.double.host.boots = lambda _: Boot(exits=0.0, stderr=text)
        with pytest.raises(errors.NoCapacity, match="host port"):
            await one.boot()
        await one.nothing_is_left()
