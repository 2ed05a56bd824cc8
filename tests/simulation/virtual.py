"""Virtual time: an event loop that jumps to its next timer, and clocks that may be wrong."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
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


class _Due(asyncio.TimerHandle):
    """A callback that is due, now or later, without what a debugger would want to know of it."""

    __slots__ = ()

    def __init__(
        self, when: float, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> None:
        self._when = when
        self._callback: Any = callback
        self._args: Any = args
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        self._callback = self._args = None

    def __hash__(self) -> int:
        return id(self)


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without input: seconds pass at once. Threads' work is done at once, in place.

    Nine tenths of a simulation's turns are pauses, so the turning is its own: no selector, no debugging,
    timers that compare as tuples. What falls due at one time happens in the order in which it was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.numbers = itertools.count()
        self._asked = itertools.count()
        self._due_now: deque[_Due] = deque()
        self._due_later: list[tuple[float, int, _Due]] = []
        self._stopping = False
        self.set_task_factory(_numbered)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self.now

    def call_soon(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """See the event loop's interface."""
        due = _Due(0.0, callback, args, context)
        self._due_now.append(due)
        return due

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """See the event loop's interface."""
        due = _Due(when, callback, args, context)
        heapq.heappush(self._due_later, (when, next(self._asked), due))
        return due

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """See the event loop's interface."""
        when = self.now + delay
        due = _Due(when, callback, args, context)
        heapq.heappush(self._due_later, (when, next(self._asked), due))
        return due

    def _run_once(self) -> None:
        """Everything, until told to stop: what is due now, then what is due next."""
        due_now, due_later = self._due_now, self._due_later
        while not self._stopping:
            if not due_now:
                self._jump(due_now, due_later)
            due = due_now.popleft()
            if due._cancelled:
                continue
            try:
                due._context.run(due._callback, *due._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - as every event loop does
                self.call_exception_handler({"message": f"in {due._callback}", "exception": error})

    def _jump(self, due_now: deque[_Due], due_later: list[tuple[float, int, _Due]]) -> None:
        """To the next moment at which something is due; all that is due then is due now."""
        while not due_now:
            if not due_later:
                raise NothingLeft
            when, _, due = heapq.heappop(due_later)
            if due._cancelled:
                continue
            self.now = max(self.now, when)
            due_now.append(due)
            while due_later and due_later[0][0] <= self.now:
                due_now.append(heapq.heappop(due_later)[2])

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


async def passing(seconds: float) -> None:
    """`asyncio.sleep`, which is half of all that happens here, without its detours."""
    if seconds <= 0:
        await asyncio.sleep(0)
        return
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()
    due = loop.call_later(seconds, _end, over)
    try:
        await over
    finally:
        due.cancel()


def _end(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


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
