"""Carries the plan out on real processes, and counts what came of it."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from examples.demo.leftovers import Machine, left, look
from examples.demo.processes import DemoFailed, marked
from examples.demo.stack import Stack
from examples.demo.validator import ValidatorPart
from tests.chaos import plan
from tests.chaos.evidence import Figures, Stored, figures
from tests.chaos.feed import Feed
from tests.chaos.plan import VALIDATOR, Fault, Kill, Step, Stop, Strike, Version, Work
from tests.network.proxy import TcpProxy

from platform_validator.crashpoint import ENVIRONMENT

RIVAL = "rival"
_READY_S = 60.0
_STRIKE_S = 45.0
_DRAINING_S = 240.0
_WORK_S = 90.0
_END_S = 240.0
_DRAIN_S = 90.0
_TICK_S = 0.1
_LOOK_EVERY_S = 0.5


@dataclass(slots=True)
class Tally:
    """What was done: every kill is an exit status of -9 that was waited for."""

    kills: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    stops: int = 0
    unrecovered: list[str] = field(default_factory=list)


class ChaosRun:
    """One run.

    Args:
        stack: What it runs on.
        proxy: Between the validator and the Platform API.
        term: Of a lease, in seconds.
        rng: How long submissions run.
        queue: How many jobs are kept open.
        say: Is told what goes on.
        shown: Is called often, for a display.
    """

    def __init__(
        self,
        stack: Stack,
        proxy: TcpProxy,
        *,
        term: float,
        rng: random.Random,
        queue: int,
        say: Callable[[str], None],
        shown: Callable[[ChaosRun], None],
    ) -> None:
        self._stack = stack
        self._proxy = proxy
        self._term = term
        self._say = say
        self._shown = shown
        self._before: Machine = look(stack.state)
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._looked = 0.0
        self._feeding = True
        self.feed = Feed(stack, rng, queue)
        self.tally = Tally()
        self.stored = Stored()
        self.step = ""

    # The run

    def begin(self) -> None:
        """The work; the parts must run.

        Raises:
            OSError: The Platform API does not take it.
        """
        self.feed.begin()

    def carry_out(self, steps: list[Step]) -> None:
        """Step after step; a point that was not passed in time gets another life at the end."""
        again: list[Step] = []
        for number, step in enumerate(steps, 1):
            self.step = f"{number}/{len(steps)} {step_name(step)}"
            self._say(self.step)
            if not self._do(step):
                again.append(step)
        for step in again:
            self.step = f"again: {step_name(step)}"
            self._say(self.step)
            if not self._do(step):
                self.tally.missed.append(step_name(step))

    def end(self) -> bool:
        """The faults stop: every job must come to its end. Whether the validators then drained in order."""
        self.step = "no more faults: every job must end"
        self._say(self.step)
        self._proxy.set()
        self._settle()
        self._feeding = False
        self._up()
        self._wait(_END_S, lambda: self.feed.open == 0)
        return self._drain(VALIDATOR)

    def leaks(self) -> tuple[list[str], dict[str, list[str]]]:
        """VMs that the VMM knows, whoever made them; and what is left of the run when all has ended."""
        vms = [str(vm["name"]) for vm in self._stack.vms()]
        self._stack.stop()
        found = left(self._before, look(self._stack.state))
        # Children that are named for nothing of the run still carry its mark.
        pids = {*found.get("processes", []), *(str(each.pid) for each in marked(self._stack.state))}
        return vms, found | ({"processes": sorted(pids)} if pids else {})

    def figures(self) -> Figures:
        """From the Platform API's database, against all that journals ever held."""
        for part in self._stack.validators:
            self.stored.read(part.database)
        return figures(self._stack.database, self.stored)

    # Steps

    def _do(self, step: Step) -> bool:
        match step:
            case Strike():
                return self._strike(step)
            case Kill():
                return self._kill_at(step)
            case Stop():
                return self._stop(step)
            case Fault():
                return self._fault(step)
            case Work():
                return self._work(step.jobs)

    def _strike(self, step: Strike) -> bool:
        """A life that is armed, from its start to its end at the point."""
        if self._alive(VALIDATOR):
            self._killed(VALIDATOR)
        part = self._stack.validator
        began = time.monotonic()
        self._stack.launch_validator(part, {ENVIRONMENT: f"{step.point}:{step.nth}"})
        if step.meanwhile is not None:
            self._later(began + step.after, self._outage(step.meanwhile, step.down))
        version = step.update
        limit = _DRAINING_S if version is Version.LARGE else _STRIKE_S
        while self._alive(VALIDATOR) and time.monotonic() - began < limit:
            self._tick()
            if version is not None and self._serves(part):
                version = None if self._pushed(version) else version
        struck = not self._alive(VALIDATOR)
        self._settle()
        if struck:
            code = self._stack.processes.parts[VALIDATOR].process.wait()
            if code == -signal.SIGKILL:
                self.tally.points[step.point] += 1
                self._count(VALIDATOR)
            else:
                self._unrecovered(f"validator ended with {code} instead of being killed at {step.point}")
        if step.update in {Version.BROKEN, Version.LARGE}:
            # What served goes on (I8), until the author has mended it.
            self._work(1)
            self._wait(_WORK_S, lambda: self._pushed(Version.GOOD))
        return struck

    def _kill_at(self, step: Kill) -> bool:
        self._up()
        self._wait(step.after)
        self._killed(step.target)
        self._wait(step.down)
        self._back(step.target)
        return True

    def _stop(self, step: Stop) -> bool:
        """Stopped while it holds jobs; another takes them; both go on."""
        self._up()
        rival = self._stack.validators[1]
        self._wait(_WORK_S, lambda: self._working(self._stack.validator))
        process = self._stack.processes.parts[VALIDATOR].process
        process.send_signal(signal.SIGSTOP)
        self.tally.stops += 1
        began = time.monotonic()
        try:
            self._start(rival)
            self._wait(step.terms * self._term - (time.monotonic() - began))
        finally:
            process.send_signal(signal.SIGCONT)
        self._work(1)
        self._drain(RIVAL)
        return True

    def _fault(self, step: Fault) -> bool:
        self._up()
        self._proxy.set(*step.toxics, directions=step.directions)
        try:
            if step.kill is not None:
                self._wait(step.kill)
                self._killed(VALIDATOR)
                self._up()
            self._wait(step.seconds - (step.kill or 0.0))
        finally:
            self._proxy.set()
        return self._work(1)

    def _work(self, jobs: int) -> bool:
        """It is not enough to be up: more results must arrive."""
        self._up()
        self.feed.look()
        wanted = self.feed.ended + jobs
        if not self._wait(_WORK_S, lambda: self.feed.ended >= wanted):
            self._unrecovered(f"no {jobs} jobs ended within {_WORK_S:.0f} s of: {self.step}")
        return True

    # Parts

    def _alive(self, name: str) -> bool:
        part = self._stack.processes.parts.get(name)
        return part is not None and part.process.poll() is None

    def _up(self) -> None:
        """The validator runs, with nothing armed, and is ready."""
        if not self._alive(VALIDATOR):
            self._start(self._stack.validator)

    def _start(self, part: ValidatorPart) -> None:
        try:
            self._stack.launch_validator(part)
            self._stack.processes.wait_for(part.name, "ready", part.ready, _READY_S)
        except DemoFailed as error:
            self._unrecovered(str(error))
            self._stack.processes.kill(part.name)

    def _killed(self, name: str) -> None:
        code = self._stack.processes.kill(name)
        if code == -signal.SIGKILL:
            self._count(name)
        else:
            self._unrecovered(f"{name} had ended with {code} before it was killed")

    def _count(self, name: str) -> None:
        self.tally.kills[name] += 1
        if name == VALIDATOR:
            self.stored.read(self._stack.validator.database)

    def _back(self, name: str) -> None:
        try:
            match name:
                case plan.VMM:
                    self._stack.restart_vmm()
                case plan.API:
                    self._stack.restart_api()
                case _:
                    self._up()
        except DemoFailed as error:
            self._unrecovered(str(error))

    def _outage(self, name: str, down: float) -> Callable[[], None]:
        def begin() -> None:
            self._killed(name)
            self._later(time.monotonic() + down, lambda: self._back(name))

        return begin

    def _drain(self, name: str) -> bool:
        code = self._stack.processes.stop(name, _DRAIN_S)
        if code != 0:
            self._unrecovered(f"{name} drained with exit code {code}")
        return code == 0

    def _unrecovered(self, what: str) -> None:
        self.tally.unrecovered.append(what)
        self._say(f"unrecovered: {what}")

    # Time

    def _later(self, due: float, act: Callable[[], None]) -> None:
        self._due.append((due, act))

    def _settle(self) -> None:
        """Whatever is to come back comes back."""
        while self._due:
            self._tick()

    def _wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        deadline = time.monotonic() + seconds
        while not (held := until()) and time.monotonic() < deadline:
            self._tick()
        return held

    def _tick(self) -> None:
        """A moment passes: what is due is done, the queue is filled."""
        time.sleep(_TICK_S)
        now = time.monotonic()
        due = [each for each in self._due if each[0] <= now]
        for each in due:
            self._due.remove(each)
            each[1]()
        if now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            self.feed.look()
            if self._feeding:
                self._tried(self.feed.fill)
        self._shown(self)

    @staticmethod
    def _tried(act: Callable[[], None]) -> bool:
        """What the Platform API does not take now, because it is dead just then, is tried another time."""
        try:
            act()
        except OSError:
            return False
        return True

    def _pushed(self, version: Version) -> bool:
        return self._tried(lambda: self.feed.update(version))

    @staticmethod
    def _serves(part: ValidatorPart) -> bool:
        challenges = (part.status() or {}).get("challenges", [])
        return any(each["state"] == "Active" for each in challenges)

    @staticmethod
    def _working(part: ValidatorPart) -> bool:
        jobs = (part.status() or {}).get("active_jobs", [])
        return any(each["stage"] == "running" for each in jobs)


def step_name(step: Step) -> str:
    """In words."""
    match step:
        case Strike():
            update = f" in an update ({step.update})" if step.update else ""
            other = f", {step.meanwhile} killed meanwhile" if step.meanwhile else ""
            return f"kill -9 at {step.point}:{step.nth}{update}{other}"
        case Kill():
            return f"kill -9 of {step.target}, back after {step.down:.1f} s"
        case Stop():
            return f"SIGSTOP for {step.terms:.0f} terms"
        case Fault():
            toxics = " + ".join(type(each).__name__ for each in step.toxics)
            return f"network: {toxics} ({', '.join(each.value for each in step.directions)})"
        case Work():
            return f"{step.jobs} jobs must end"
