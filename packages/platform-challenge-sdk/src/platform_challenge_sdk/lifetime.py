"""When a CVM's program ends by itself, whatever becomes of its validator and of its own event loop."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

JOB_SILENCE = 15 * 60.0
OVERDUE = 30.0
"""Seconds after its end that a program whose event loop does not end it is ended by its thread."""
_LOOK = 5.0
_EXIT = 70


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Seconds on one clock. `hard` counts from `started` and is never renewed; `idle` from the last frame.

    `idle` is user_config's max_lifetime_s, renewed by authenticated frames; `hard` its hard_lifetime_s.
    """

    started: float
    idle: float
    hard: float

    def left(self, *, last_frame: float, holds_job: bool, now: float) -> tuple[float, str]:
        """(seconds left, why it ends then). A program that holds a job also ends after 15 min of silence."""
        ends = [
            (self.started + self.hard - now, "hard_lifetime_s is over"),
            (last_frame + self.idle - now, "max_lifetime_s without an authenticated frame"),
        ]
        if holds_job:
            ends.append((last_frame + JOB_SILENCE - now, "15 min without an authenticated frame of a job"))
        return min(ends)


class LastResort:
    """A thread that ends the process when a handler holds the event loop past the end of the lifetime.

    Args:
        left: Seconds left, and why it ends then; called from the thread.
        overdue: Seconds, by no injected clock, that the end must have passed for.
    """

    def __init__(self, left: Callable[[], tuple[float, str]], overdue: float = OVERDUE) -> None:
        self._left = left
        self._overdue = overdue
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="lifetime").start()

    def stop(self) -> None:
        """The event loop ends by itself."""
        self._stopped.set()

    def _run(self) -> None:
        passed: float | None = None
        while not self._stopped.wait(min(_LOOK, self._overdue)):
            try:
                left, why = self._left()
            except RuntimeError:  # the event loop moves, and changed what was read
                left, why = _LOOK, ""
            if left > 0:
                passed = None
                continue
            passed = time.monotonic() if passed is None else passed
            if time.monotonic() - passed >= self._overdue:
                sys.stderr.write(f"platform-boot: ended by force, for the event loop stands still: {why}\n")
                sys.stderr.flush()
                os._exit(_EXIT)
