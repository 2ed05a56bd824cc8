"""What the machines share: real parts on virtual time, one step after the other, and one small profile."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from tests.simulation.virtual import EPOCH, VirtualLoop

_T = TypeVar("_T")

PROFILE = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    report_multiple_bugs=False,
)
"""Small, and the same at every run: the suite must not fail by chance."""

HUNT = settings(PROFILE, max_examples=5_000, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
"""To find a fault that was put in: it ends with the first example, however large that is."""


class LoopClock:
    """The loop's seconds as every clock; the wall clock may be off."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.off = timedelta(0)

    def now(self) -> datetime:
        """The wall clock."""
        return EPOCH.astimezone(UTC) + timedelta(seconds=self._loop.now) + self.off

    def monotonic(self) -> float:
        """Virtual seconds."""
        return self._loop.now

    def boottime(self) -> float:
        """Virtual seconds."""
        return self._loop.now

    async def sleep(self, seconds: float) -> None:
        """Wait on the virtual loop."""
        await asyncio.sleep(seconds)


class TimedMachine(RuleBasedStateMachine):
    """A state machine with a loop of its own, whose time passes only when a rule lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.clock = LoopClock(self.loop)
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Begin something that goes on while time passes."""
        task = self.loop.create_task(work)
        self._tasks.append(task)
        return task

    def do(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do something to its end; time passes as it needs."""
        return self.loop.run_until_complete(work)

    def let_pass(self, seconds: float) -> None:
        """Time passes, and what is under way goes on."""
        self.do(asyncio.sleep(seconds))

    def freeze(self, seconds: float) -> None:
        """Time passes and nothing runs, as under SIGSTOP or while the machine sleeps."""
        self.loop.now += seconds

    def stop(self, task: asyncio.Task[Any]) -> None:
        """Cancel something and see it end."""
        task.cancel()
        self.do(_ended(task))
        self._tasks.remove(task)

    def teardown(self) -> None:
        """Leave no task behind."""
        for task in list(self._tasks):
            self.stop(task)
        self.loop.close()


async def _ended(task: asyncio.Task[Any]) -> None:
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


def finds(machine: type[RuleBasedStateMachine]) -> None:
    """Assert that the machine fails: a fault was put in that it must find."""
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=HUNT)
