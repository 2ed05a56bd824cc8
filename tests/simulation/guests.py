"""What runs inside the CVMs of one host: each boot of each VM, with the job that it was given."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from tests.simulation.laws import Laws, Script
from tests.simulation.plan import Plan

from platform_protocol.ids import JobId, VmId, VmName
from platform_validator.cvm.memory import Machine, MemoryVmm
from platform_validator.cvm.vmm import VmState


@dataclass(slots=True)
class Guest:
    """One boot of one VM, until it ends; it lives on while validators come and go."""

    ready_at: float
    boot_error: str = ""
    session_id: str | None = None
    configured: bool = False
    job_id: JobId | None = None
    attempt: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    script: Script | None = None


class Guests:
    """The guests of one host.

    Args:
        vmm: Whose machines they run in.
        plan: How often they come to harm.
        laws: Know the scripts of the jobs.
        dice: Chance.
    """

    def __init__(self, vmm: MemoryVmm, plan: Plan, laws: Laws, dice: random.Random) -> None:
        self._vmm = vmm
        self._plan = plan
        self._laws = laws
        self._dice = dice
        self._boots: dict[tuple[VmId, int], Guest] = {}
        self.healed = False

    def running(self, name: VmName) -> tuple[Machine, Guest] | None:
        """The machine of a name that runs, and what runs in it."""
        for machine in self._vmm.machines():
            if machine.spec.name == name and machine.state is VmState.RUNNING:
                return machine, self.of(machine)
        return None

    def of(self, machine: Machine) -> Guest:
        """What runs in a machine since its last boot."""
        key = machine.id, machine.boots
        if key not in self._boots:
            dice, now = self._dice, asyncio.get_running_loop().time()
            guest = Guest(now + dice.uniform(0.5, 8.0))
            if not self.healed and dice.random() < self._plan.vmm_faults:
                # It says that it runs, and its SDK never answers; or its boot fails, and the VMM says so.
                guest.ready_at = float("inf")
                guest.boot_error = dice.choice(("", "kernel panic"))
                machine.boot_error = guest.boot_error
            self._boots[key] = guest
        return self._boots[key]

    def begin(self, machine: Machine, guest: Guest, job_id: JobId, attempt: int) -> None:
        """It was given a job; how that goes on is its script's affair, and its host's."""
        script = self._laws.scripts[job_id]
        guest.job_id, guest.attempt, guest.script = job_id, attempt, script
        loop = asyncio.get_running_loop()
        if script.does in ("score", "error"):
            loop.call_later(script.lasts, guest.done.set)
        if script.does == "kill":
            loop.call_later(script.lasts, self._harm, machine, guest, "crash")
        if not self.healed and self._dice.random() < self._plan.deaths:
            how = self._dice.choice(("crash", "restart", "vanish"))
            loop.call_later(self._dice.uniform(0, script.lasts), self._harm, machine, guest, how)

    def ended(self, machine: Machine) -> None:
        """The machine's process ended: by stop, crash, restart or removal."""
        guest = self._boots.get((machine.id, machine.boots))
        if guest is not None:
            guest.gone.set()

    def _harm(self, machine: Machine, guest: Guest, how: str) -> None:
        if guest.gone.is_set() or machine not in self._vmm.machines():
            return
        guest.gone.set()
        self._laws.book.counts[f"vm_{how}"] += 1
        match how:
            case "crash":
                machine.state = VmState.EXITED
            case "restart":
                machine.boots += 1
            case "vanish":
                self._vmm.vanish(machine.spec.name)
