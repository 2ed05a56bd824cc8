"""Waiting for what another task, thread or process makes true and tells nobody of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_LOOK_S = 0.005


async def until(holds: Callable[[], object], within: float = 30.0) -> None:
    """Look until it is so. This is where tests sleep: what they wait for is no event of theirs.

    Raises:
        AssertionError: It was not so within so many seconds, which are many, since machines can be busy.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    while not holds():
        assert loop.time() < deadline, f"it was not so within {within:g} s"
        await asyncio.sleep(_LOOK_S)


def wait_until(what: str, holds: Callable[[], object], within: float = 30.0) -> None:
    """The same without an event loop; `what` is what it waits for, in a word.

    Raises:
        AssertionError: See `until`.
    """
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, f"not {what} within {within:g} s"
        time.sleep(10 * _LOOK_S)  # what is looked at is another process, and a look costs it something
