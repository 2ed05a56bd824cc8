"""Runs a program's main coroutine so that no handler can end it, and nothing keeps it from ending."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any


def run_program(main: Coroutine[Any, Any, int]) -> int:
    """Run to the end and return the exit code.

    `sys.exit` in a task that a handler started leaves the event loop; the loop is then simply entered again.
    """
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    task = loop.create_task(main)
    try:
        while True:
            try:
                return loop.run_until_complete(task)
            except (SystemExit, KeyboardInterrupt) as error:
                if task.done():
                    raise
                sys.stderr.write(f"a handler's task raised {type(error).__name__}; going on\n")
    finally:
        loop.close()


def exit_program(code: int) -> None:
    """End now: a handler's thread that never returns, or its atexit, must not keep the VM alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_on_signals(stop: asyncio.Event) -> None:
    """SIGTERM and SIGINT end the server in an orderly way."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
