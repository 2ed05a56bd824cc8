"""One validator's host: its VMM, which misbehaves, and the port to it of one life of the validator."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from tests.simulation.faults import strike
from tests.simulation.guests import Guests
from tests.simulation.laws import Laws
from tests.simulation.plan import NodePlan, Plan
from tests.simulation.world import Life

from platform_protocol.ids import VmId, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_validator.clock import Clock
from platform_validator.cvm.errors import BootFailed
from platform_validator.cvm.memory import Machine, MemoryVmm
from platform_validator.cvm.usage import VmUsage
from platform_validator.cvm.vmm import (
    Vm,
    VmmAtCapacity,
    VmmFacts,
    VmmRefused,
    VmmUnavailable,
    VmNotFound,
    VmSpec,
    VmState,
)

_TIMEOUT = 30.0
_HOURS = 7200.0
_CREATES = 1.5
"""How much oftener CreateVm fails than other calls: it has the most ways to."""
_FULL = {
    "no_cpu": "not enough vCPUs",
    "no_memory": "not enough memory",
    "no_cids": "CID pool exhausted",
    "no_gpu": "no free GPU",
}
LATEST = 200.0
"""After so many virtual seconds at most a CreateVm is done whose caller has given up."""
_ENDED = frozenset({VmState.STOPPED, VmState.EXITED, VmState.REMOVING})


class Host:
    """What outlives a validator's process: its VMM and the VMs, ours and others'.

    Args:
        node: The validator's number.
        state_id: In the names of its CVMs, and of some VMs that are not its own.
        plan: How bad things are.
        limits: What its CVMs together may use, and how many they may be.
        laws: Are told.
        dice: Chance.
    """

    def __init__(
        self,
        node: int,
        state_id: str,
        plan: tuple[Plan, NodePlan],
        limits: tuple[Resources, int],
        laws: Laws,
        dice: random.Random,
    ) -> None:
        self.vmm = MemoryVmm(level=IsolationLevel.CONTAINER)
        self.plan, self.mine = plan
        self.node, self.limits, self.laws, self.dice = node, limits, laws, dice
        self.guests = Guests(self.vmm, self.plan, laws, dice)
        self.healed = False
        self.doubles: set[VmName] = set()
        self.slow_removals = 1 if self.plan.removing_hours else 0
        self.foreign = [
            VmName(f"pv-{state_id}-somebody-elses"),
            VmName(f"pv-{state_id}"),
            VmName("pv-ffffffffff-another-validator"),
        ]
        for number, name in enumerate(self.foreign):
            self.vmm.make_late(_spec_of(name, 60_000 + number))

    def heal(self) -> None:
        """From now on it behaves; what takes hours goes on taking them."""
        self.healed = self.guests.healed = True

    def strike(self, kind: str) -> None:
        """Count a fault."""
        strike(self.laws.book, kind)

    def restart_vmm(self) -> None:
        """Every VM boots anew, and knows nothing of before."""
        if not self.healed:
            self.strike("vmm_restart")
            for machine in self._ours():
                self.guests.harm(machine, "restart")

    def meddle(self) -> None:
        """Something happens to a VM of ours, whatever it is doing."""
        found = self._ours()
        if found and not self.healed:
            self.guests.harm(self.dice.choice(found), self.dice.choice(("crash", "restart", "vanish")))

    def removing(self) -> list[str]:
        """VMs that are on their way out."""
        return [machine.spec.name for machine in self.vmm.machines() if machine.state is VmState.REMOVING]

    def _ours(self) -> list[Machine]:
        return [
            machine
            for machine in self.vmm.machines()
            if machine.spec.name not in self.foreign and machine.state is VmState.RUNNING
        ]

    def left(self) -> list[str]:
        """VMs that are there and were made for this validator."""
        return [machine.spec.name for machine in self.vmm.machines() if machine.spec.name not in self.foreign]

    def foreign_left(self) -> int:
        """How many of the VMs of others are still there and run."""
        return sum(
            machine.spec.name in self.foreign and machine.state is VmState.RUNNING
            for machine in self.vmm.machines()
        )

    def make(self, spec: VmSpec) -> Machine:
        """Make a VM, whatever became of whoever asked."""
        vm_id = self.vmm.make_late(spec)
        self.laws.book.note(f"make {self.node} {spec.name} {vm_id}")
        machine = next(each for each in self.vmm.machines() if each.id == vm_id)
        self.guests.of(machine)
        return machine


class VmmLine:
    """The VMM port of one life."""

    def __init__(self, host: Host, life: Life) -> None:
        self._host = host
        self._life = life

    async def facts(self) -> VmmFacts:
        """See the port."""
        await self._arrive("facts")
        return await self._host.vmm.facts()

    async def create(self, spec: VmSpec) -> VmId:
        """See the port. It may be done late, or twice, or under an id that nobody sees again."""
        host, dice = self._host, self._host.dice
        await self._arrive("create")
        others = [
            machine.spec.resources
            for machine in host.vmm.machines()
            if machine.spec.name not in host.foreign
            and machine.spec.name not in host.doubles
            and machine.state is VmState.RUNNING
        ]
        host.laws.creates(host.node, spec.name, [*others, spec.resources], *host.limits)
        if not host.healed and dice.random() < host.plan.vmm_faults * _CREATES:
            made = await self._create_badly(spec)
            if made is not None:
                return made
        return host.make(spec).id

    async def _create_badly(self, spec: VmSpec) -> VmId | None:
        host, dice = self._host, self._host.dice
        kinds = ("lost", "unanswered", "late", "twice", "ghost", "refused", "port", "full", "full", "full")
        match dice.choice(kinds):
            case "lost":
                host.strike("create_lost")
                await self._silence("create")
            case "unanswered":
                host.strike("create_unanswered")
                host.make(spec)
                await self._silence("create")
            case "late":
                host.strike("create_late")
                host.doubles.add(spec.name)
                loop = asyncio.get_running_loop()
                loop.call_later(dice.uniform(1, LATEST - _TIMEOUT), host.make, spec)
                await self._silence("create")
            case "twice":
                host.strike("create_twice")
                host.doubles.add(spec.name)
                host.make(spec)
                return host.make(spec).id
            case "ghost":
                host.strike("create_ghost")
                return VmId(f"ghost-{spec.name}")
            case "refused":
                host.strike("create_refused")
                raise VmmRefused("vmm: internal error")
            case "port":
                host.strike("port_taken")
                raise VmmRefused(f"vmm: port {spec.host_port} is in use")
            case "full":
                lacking = dice.choice(sorted(_FULL))
                host.strike(lacking)
                raise VmmAtCapacity(_FULL[lacking])
        return None

    async def list(self, prefix: str = "") -> Sequence[Vm]:
        """See the port."""
        await self._arrive("list")
        found = await self._host.vmm.list(prefix)
        if any(vm.name in self._host.foreign for vm in found):
            self._host.strike("foreign_seen")
        return found

    async def get(self, vm_id: VmId) -> Vm | None:
        """See the port."""
        await self._arrive("get")
        return await self._host.vmm.get(vm_id)

    async def usage(self, vm_id: VmId) -> VmUsage | None:
        """See the port."""
        await self._arrive("usage")
        return await self._host.vmm.usage(vm_id)

    async def stop(self, vm_id: VmId) -> None:
        """See the port."""
        await self._change("stop", vm_id)
        await self._host.vmm.stop(vm_id)
        await self._maybe_silence("stop")

    async def remove(self, vm_id: VmId) -> None:
        """See the port. It may take minutes, or hours."""
        host, dice = self._host, self._host.dice
        await self._change("remove", vm_id)
        for machine in host.vmm.machines():
            if machine.id == vm_id:
                host.laws.destroys(self._life, machine.spec.name)
        if not host.healed and dice.random() < host.plan.vmm_faults:
            match dice.choice(("failed", "hangs", "unknown")):
                case "failed":
                    host.strike("remove_failed")
                    raise VmmRefused("vmm: remove failed")
                case "hangs":
                    host.strike("remove_hangs")
                    await self._silence("remove")
                case "unknown":
                    host.strike("remove_unknown")
                    raise VmNotFound(f"vmm: {vm_id} not found")
        if any(machine.id == vm_id and machine.state is VmState.REMOVING for machine in host.vmm.machines()):
            # Asked again, which hastens nothing.
            return
        lasting = self._lasting()
        host.vmm.removes_at_once = not lasting
        await host.vmm.remove(vm_id)
        if lasting:
            asyncio.get_running_loop().call_later(lasting, host.vmm.finish_removals, vm_id)
        await self._maybe_silence("remove")

    def _lasting(self) -> float:
        """For how long the next VM stays `removing`."""
        host = self._host
        if host.healed:
            return 0.0
        if host.slow_removals:
            host.slow_removals -= 1
            host.strike("removing_hours")
            return _HOURS
        if host.dice.random() >= host.plan.vmm_faults:
            return 0.0
        host.strike("removing_long")
        return host.dice.choice((5.0, 100.0, 1000.0))

    async def logs(self, vm_id: VmId, lines: int) -> str:
        """See the port."""
        await self._arrive("logs")
        return await self._host.vmm.logs(vm_id, lines)

    async def close(self) -> None:
        """Nothing to close."""

    async def _change(self, name: str, vm_id: VmId) -> None:
        await self._arrive(name)
        for machine in self._host.vmm.machines():
            if machine.id == vm_id:
                self._host.laws.touches(self._host.node, machine.spec.name)
                self._host.laws.book.note(f"{name} {self._host.node} {machine.spec.name} {vm_id}")
                self._host.guests.ended(machine)

    async def _arrive(self, name: str) -> None:
        host, life = self._host, self._life
        life.check()
        await life.pause(host.dice.uniform(0.001, 0.02))
        if host.healed:
            return
        now = asyncio.get_running_loop().time()
        down = any(window.holds(now) for window in host.mine.vmm_down)
        if down or (name != "create" and host.dice.random() < host.plan.vmm_faults / 2):
            host.strike("vmm_down" if down else "vmm_silent")
            await life.pause(host.dice.choice((0.01, _TIMEOUT)))
            raise VmmUnavailable(f"{name}: connection refused")

    async def _maybe_silence(self, name: str) -> None:
        if not self._host.healed and self._host.dice.random() < self._host.plan.vmm_faults / 2:
            self._host.strike(f"{name}_unanswered")
            await self._silence(name)

    async def _silence(self, name: str) -> None:
        await self._life.pause(_TIMEOUT)
        raise VmmUnavailable(f"{name}: no answer within {_TIMEOUT:.0f} s")


class SimulatedProbe:
    """Waits for a guest as the real probe does: the VMM's word first, then the SDK's."""

    def __init__(self, host: Host, line: VmmLine, clock: Clock) -> None:
        self._host = host
        self._line = line
        self._clock = clock

    async def until_ready(self, vm_id: VmId) -> tuple[str, int]:
        """See the port."""
        while True:
            vm = await self._line.get(vm_id)
            if vm is None:
                raise BootFailed("the VMM has no such VM any more")
            if vm.boot_error:
                raise BootFailed(f"boot_error: {vm.boot_error}")
            if vm.state in _ENDED:
                raise BootFailed(f"it {vm.state.value} while booting")
            found = self._host.guests.running(vm.name)
            now = asyncio.get_running_loop().time()
            if found is not None and now >= found[1].ready_at and vm.address is not None:
                return vm.address
            await self._clock.sleep(1.5)


def _spec_of(name: VmName, port: int) -> VmSpec:
    return VmSpec(
        name=name,
        image="memory",
        compose=b"{}",
        user_config="{}",
        resources=Resources(cpu_cores=1, memory_mb=64, disk_mb=64),
        host_port=port,
        guest_port=10000,
        tee=False,
        simulated_tee=False,
    )
