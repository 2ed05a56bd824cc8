"""A VMM in memory: keeps the port's promises, boots scripted guests on loopback, and fails when told to.

Shipped, so that a fleet can be tried and simulated on a machine without any VMM.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from platform_protocol.ids import VmId, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.user_config import UserConfig
from platform_validator.cvm.quota import Limits, decide
from platform_validator.cvm.testing_guest import GuestScript, ScriptedGuest
from platform_validator.cvm.usage import VmUsage
from platform_validator.cvm.vmm import (
    Vm,
    VmmAtCapacity,
    VmmError,
    VmmFacts,
    VmmImage,
    VmmRefused,
    VmmUnavailable,
    VmNotFound,
    VmSpec,
    VmState,
)

HOST = "127.0.0.1"
IMAGE = "memory"
RUNTIME_DIGEST = "sha256:" + "a" * 64
USAGE = VmUsage(
    cpu_time_ms=1500,
    memory_bytes=2**25,
    memory_peak_bytes=2**26,
    disk_bytes=2**20,
    network_bytes=2**10,
)
"""What each machine says of itself until it is given something else."""


@dataclass(slots=True)
class Fault:
    """A call that fails. `after`: its effect happened all the same."""

    error: VmmError
    after: bool = False


@dataclass(slots=True)
class Machine:
    """A VM of this VMM, to be looked at and disturbed. `guest` None: nothing serves in it."""

    id: VmId
    spec: VmSpec
    state: VmState = VmState.RUNNING
    boot_progress: str = "booting"
    boot_error: str = ""
    instance: str | None = None
    console: list[str] = field(default_factory=list)
    guest: ScriptedGuest | None = None
    boots: int = 0
    usage: VmUsage | None = USAGE
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class MemoryVmm:
    """An async context: guests run as its tasks, and are gone when it is left.

    Args:
        script: What each guest does, by the spec that it was made of; None: no guest is run.
        limits: How much it can host; None: no end.
        level: The isolation that its one image claims.
        removes_at_once: False: removal waits for `finish_removals`, as a slow dstack's would.

    Attributes:
        asked: The spec of every `create`, also of those that failed.
        calls: The port's methods in the order in which they were called.
    """

    def __init__(
        self,
        *,
        script: Callable[[VmSpec], GuestScript] | None = None,
        limits: Limits | None = None,
        level: IsolationLevel = IsolationLevel.CONTAINER,
        removes_at_once: bool = True,
    ) -> None:
        self.asked: list[VmSpec] = []
        self.calls: list[str] = []
        self.removes_at_once = removes_at_once
        self._script = script
        self._limits = limits
        self._level = level
        self._machines: dict[VmId, Machine] = {}
        self._faults: dict[str, deque[Fault]] = {}
        self._numbers = itertools.count(1)
        self._tasks = asyncio.TaskGroup()
        self._killed = False

    async def __aenter__(self) -> Self:
        """Run guests from now on."""
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Switch every guest off."""
        for machine in self._machines.values():
            _switch_off(machine)
        await self._tasks.__aexit__(kind, error, trace)

    # What a test does to it

    def fail(self, method: str, error: VmmError, *, times: int = 1, after: bool = False) -> None:
        """The next `times` calls of a method raise; with `after`, what they should do is done first."""
        self._faults.setdefault(method, deque()).extend(Fault(error, after) for _ in range(times))

    def heal(self) -> None:
        """Drop every fault that has not happened yet."""
        self._faults.clear()

    def kill(self) -> None:
        """The VMM's process dies, and its VMs with it: no call is answered until it is started again."""
        self._killed = True
        for machine in self.machines():
            _switch_off(machine)
            machine.state = VmState.EXITED

    def start_again(self) -> None:
        """It is back, and starts what it had, as dstack does: the guests know nothing of before."""
        self._killed = False
        for machine in self.machines():
            if machine.state is VmState.EXITED:
                self._boot(machine)

    def make_late(self, spec: VmSpec) -> VmId:
        """A CreateVm whose caller has given up succeeds now."""
        return self._make(spec).id

    def machines(self) -> list[Machine]:
        """Every VM that is there."""
        return list(self._machines.values())

    def machine(self, name: VmName) -> Machine:
        """The VM of a name. Raises KeyError without one."""
        found = [machine for machine in self._machines.values() if machine.spec.name == name]
        if not found:
            raise KeyError(name)
        return found[0]

    def crash(self, name: VmName) -> None:
        """Its process dies."""
        machine = self.machine(name)
        _switch_off(machine)
        machine.state = VmState.EXITED

    def restart(self, name: VmName) -> None:
        """Its process died and was started again: the guest knows nothing of before."""
        machine = self.machine(name)
        before = machine.task
        _switch_off(machine)
        self._boot(machine, after=before)

    def vanish(self, name: VmName) -> None:
        """Somebody else removed it."""
        machine = self.machine(name)
        _switch_off(machine)
        del self._machines[machine.id]

    def finish_removals(self, vm_id: VmId | None = None) -> None:
        """What is `removing` is gone now: everything, or the one that is named."""
        for machine in self.machines():
            if machine.state is VmState.REMOVING and vm_id in (None, machine.id):
                del self._machines[machine.id]

    # The port

    async def facts(self) -> VmmFacts:
        """See the port."""
        self._note("facts")
        runtimes = {"platform-runtime": RUNTIME_DIGEST}
        return VmmFacts("0.6.0", (VmmImage(IMAGE, self._level, runtimes, local=True),))

    async def create(self, spec: VmSpec) -> VmId:
        """See the port."""
        self.asked.append(spec)
        fault = self._note("create")
        self._check(spec)
        machine = self._make(spec)
        if fault is not None:
            raise fault.error
        return machine.id

    async def list(self, prefix: str = "") -> Sequence[Vm]:
        """See the port."""
        self._note("list")
        return [_shown(machine) for machine in self.machines() if machine.spec.name.startswith(prefix)]

    async def get(self, vm_id: VmId) -> Vm | None:
        """See the port."""
        self._note("get")
        machine = self._machines.get(vm_id)
        return None if machine is None else _shown(machine)

    async def stop(self, vm_id: VmId) -> None:
        """See the port."""
        fault = self._note("stop")
        machine = self._of(vm_id)
        _switch_off(machine)
        if machine.state is not VmState.REMOVING:
            machine.state = VmState.STOPPED
        if fault is not None:
            raise fault.error

    async def remove(self, vm_id: VmId) -> None:
        """See the port."""
        fault = self._note("remove")
        machine = self._of(vm_id)
        if machine.state is VmState.RUNNING:
            raise VmmRefused("VM is running, stop it first")
        if self.removes_at_once:
            del self._machines[vm_id]
        else:
            machine.state = VmState.REMOVING
        if fault is not None:
            raise fault.error

    async def logs(self, vm_id: VmId, lines: int) -> str:
        """See the port."""
        self._note("logs")
        return "\n".join(self._of(vm_id).console[-lines:])

    async def usage(self, vm_id: VmId) -> VmUsage | None:
        """See the port: what its machine was given."""
        fault = self._note("usage")
        if fault is not None:
            raise fault.error
        machine = self._machines.get(vm_id)
        return machine.usage if machine is not None and machine.state is VmState.RUNNING else None

    async def close(self) -> None:
        """See the port."""

    # Inside

    def _note(self, method: str) -> Fault | None:
        """Count a call; a fault that comes before its effect is raised here."""
        self.calls.append(method)
        if self._killed:
            raise VmmUnavailable("no answer from the VMM")
        waiting = self._faults.get(method)
        fault = waiting.popleft() if waiting else None
        if fault is not None and not fault.after:
            raise fault.error
        return fault

    def _check(self, spec: VmSpec) -> None:
        if spec.image != IMAGE:
            raise VmmRefused(f"image {spec.image!r} not found")
        if spec.tee and self._level is not IsolationLevel.TEE:
            raise VmmRefused("no TEE here: set no_tee")
        for machine in self.machines():
            if machine.spec.host_port == spec.host_port and machine.state is VmState.RUNNING:
                raise VmmRefused(f"port mapping tcp:{spec.host_port} conflicts with VM {machine.id}")
        if self._limits is None:
            return
        refusal = decide(
            self._limits, (machine.spec.resources for machine in self.machines()), spec.resources
        )
        if refusal is not None:
            raise VmmAtCapacity(f"not enough {refusal}")

    def _make(self, spec: VmSpec) -> Machine:
        machine = Machine(VmId(f"memory-{next(self._numbers)}"), spec)
        self._machines[machine.id] = machine
        self._boot(machine)
        return machine

    def _boot(self, machine: Machine, after: asyncio.Task[None] | None = None) -> None:
        machine.state, machine.boots = VmState.RUNNING, machine.boots + 1
        if self._script is None:
            machine.boot_progress = "done"
            return
        config = UserConfig.model_validate_json(machine.spec.user_config)
        machine.guest = ScriptedGuest(config, self._script(machine.spec))
        machine.task = self._tasks.create_task(self._host(machine, machine.guest, after))

    async def _host(self, machine: Machine, guest: ScriptedGuest, after: asyncio.Task[None] | None) -> None:
        machine.boot_progress = "done"
        if after is not None:
            await asyncio.wait({after})  # the process that died holds the port until then
        try:
            await guest.serve(HOST, machine.spec.host_port)
        except OSError:
            port = machine.spec.host_port
            machine.console.append(f"Could not set up host forwarding rule 'tcp:{HOST}:{port}-:10000'")
            machine.state = VmState.EXITED

    def _of(self, vm_id: VmId) -> Machine:
        machine = self._machines.get(vm_id)
        if machine is None:
            raise VmNotFound(f"VM not found: {vm_id}")
        return machine


def _switch_off(machine: Machine) -> None:
    if machine.task is not None:
        machine.task.cancel()
        machine.task = None
    machine.guest = None


def _shown(machine: Machine) -> Vm:
    return Vm(
        id=machine.id,
        name=machine.spec.name,
        state=machine.state,
        boot_progress=machine.boot_progress,
        boot_error=machine.boot_error,
        instance=machine.instance,
        address=(HOST, machine.spec.host_port),
        resources=machine.spec.resources,
    )
