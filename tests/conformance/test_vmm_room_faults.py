"""A VMM without room, by dstack's double: the job is given back, and is no failure."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from tests.conformance.house import PLAN, VERSIONS, MakeHouse
from tests.dstack_double import Boot, Fault
from tests.dstack_double.server import IMAGE

from platform_validator.cvm import errors
from platform_validator.cvm.plan import CvmPlan

each_version = pytest.mark.parametrize("version", VERSIONS)


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
