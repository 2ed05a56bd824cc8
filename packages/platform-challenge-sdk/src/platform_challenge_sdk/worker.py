"""Runs what blocks in a thread of its own, which never keeps the process from ending."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Call it in a new daemon thread and wait; whatever it raises, it raises here.

    A handler that never returns would keep a pool's thread, and with it the process, alive for ever. When
    the waiting is cancelled the thread goes on, and its result is dropped.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]  # without an error it is function's own T
        elif isinstance(error, StopIteration):
            told = RuntimeError("StopIteration was raised")
            told.__cause__ = error
            done.set_exception(told)  # a future cannot carry StopIteration
        else:
            done.set_exception(error)

    def work() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = context.run(function, *arguments)
        except BaseException as error:  # noqa: BLE001 - sys.exit too is the waiting one's business
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, daemon=True, name=getattr(function, "__name__", "worker")).start()
    return await done
