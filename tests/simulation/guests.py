"""What runs inside the CVMs of one host: each boot of each VM, with the job that it was given."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from tests.simulation.faults import strike
from tests.simulation.laws import Laws, Script
from tests.simulation.plan import Plan
from tests.simulation.source import seats_of

from platform_protocol.ids import JobId, VmId, VmName
from platform_validator.cvm.memory import Machine, MemoryVmm
from platform_validator.cvm.vmm import VmState


@dataclass(slots=True)
class Given:
    """A job that a guest was given."""

    attempt: int
    script: Script
    done: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: bool = False

    @property
    def over(self) -> bool:
        """Whether it runs no more."""
        return self.cancelled or self.done.is_set()


@dataclass(slots=True)
class Guest:
    """One boot of one VM, until it ends; it lives on while validators come and go.

    `seats`: how many jobs it runs at once, in `shared` mode; None: one in its life.
    """

    ready_at: float
    seats: int | None
    boot_error: str = ""
    session_id: str | None = None
    configured: bool = False
    given: dict[JobId, Given] = field(default_factory=dict)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def may_begin(self) -> bool:
        """Whether another job may."""
        if self.seats is None:
            return not self.given
        return sum(not each.over for each in self.given.values()) < self.seats


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
            guest = Guest(now + dice.uniform(0.5, 8.0), seats_of(machine.spec.compose))
            if not self.healed and dice.random() < self._plan.vmm_faults:
                # It says that it runs, and its SDK never answers; or its boot fails, and the VMM says so.
                guest.ready_at = float("inf")
                guest.boot_error = dice.choice(("", "kernel panic"))
                strike(self._laws.book, "boot_error" if guest.boot_error else "never_answers")
                machine.boot_error = guest.boot_error
            self._boots[key] = guest
        return self._boots[key]

    def begin(self, machine: Machine, guest: Guest, job_id: JobId, attempt: int) -> None:
        """It was given a job; how that goes on is its script's affair, and its host's."""
        script = self._laws.scripts[job_id]
        guest.given[job_id] = given = Given(attempt, script)
        self._laws.book.counts["shared"] += guest.seats is not None
        loop = asyncio.get_running_loop()
        if script.does in ("score", "error"):
            loop.call_later(script.lasts, given.done.set)
        if script.does == "kill":
            loop.call_later(script.lasts, self._kill, machine, guest)
        if not self.healed and self._dice.random() < self._plan.deaths:
            how = self._dice.choice(("crash", "restart", "vanish"))
            loop.call_later(self._dice.uniform(0, script.lasts), self._befall, machine, guest, how)

    def ended(self, machine: Machine) -> None:
        """The machine's process ended: by stop, crash, restart or removal."""
        guest = self._boots.get((machine.id, machine.boots))
        if guest is not None:
            guest.gone.set()

    def harm(self, machine: Machine, how: str) -> None:
        """Its process ends: `crash`, `restart` by the VMM, or `vanish` by somebody else's hand."""
        if machine.state is not VmState.RUNNING or machine not in self._vmm.machines():
            return
        self.ended(machine)
        strike(self._laws.book, f"vm_{how}")
        match how:
            case "crash":
                machine.state = VmState.EXITED
            case "restart":
                machine.boots += 1
            case "vanish":
                self._vmm.vanish(machine.spec.name)

    def _befall(self, machine: Machine, guest: Guest, how: str) -> None:
        if not guest.gone.is_set():
            self.harm(machine, how)

    def _kill(self, machine: Machine, guest: Guest) -> None:
        """By its own submission: no fault of anything around it."""
        if not guest.gone.is_set():
            guest.gone.set()
            machine.state = VmState.EXITED
