"""Virtual time: an event loop that jumps to its next timer, and clocks that may be wrong."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, TypeVarTuple, Unpack

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


_Ts = TypeVarTuple("_Ts")
_T = TypeVar("_T")


class NothingLeft(Exception):
    """Every task waits for something that no timer will bring."""


class NumberedTask(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address: a replay cancels in the same order."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._number: int = next(named["loop"].numbers)
        super().__init__(*arguments, **named)

    def __hash__(self) -> int:
        return self._number


class _Jump:
    """What the loop selects from: nothing ever arrives, so that waiting is only time that passes."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise NothingLeft
        self._loop.now += timeout
        return []

    def close(self) -> None:
        pass


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without input: seconds pass at once. Threads' work is done at once, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.numbers = itertools.count()
        self._selector = _Jump(self)
        self._clock_resolution = 1e-6
        self.set_task_factory(_numbered)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self.now

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """There are no threads."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[_Ts]], _T], *args: *_Ts
    ) -> asyncio.Future[_T]:
        """Do it now; the answer is there at the next turn."""
        done: asyncio.Future[_T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever waits
            done.set_exception(error)
        return done

    async def shutdown_default_executor(self) -> None:
        """There is none."""


def _numbered(
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, _T] | Generator[Any, None, _T],
    context: Context | None = None,
) -> asyncio.Task[_T]:
    return NumberedTask(coro, loop=loop, context=context)


class Wall:
    """The wall clock of one machine: right, but for jumps. Shared by all lives of its validator."""

    def __init__(self) -> None:
        self.off = timedelta(0)

    def now(self) -> datetime:
        """Aware, in UTC."""
        return EPOCH + timedelta(seconds=asyncio.get_running_loop().time()) + self.off
