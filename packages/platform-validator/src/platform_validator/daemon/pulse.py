"""Whether the loops turn: each shows life whenever it does, and one that does not is named."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from platform_validator.clock import Clock

TURNS_WITHIN = timedelta(minutes=3)
"""Longer than any loop may wait by itself (60 s) and for an answer on top: silence means it is stuck."""


class Pulse:
    """Not thread-safe: it lives on the event loop, and stands still with it.

    Args:
        clock: Its monotonic seconds are counted.
        within: How long a loop may be silent.
    """

    def __init__(self, clock: Clock, within: timedelta = TURNS_WITHIN) -> None:
        self._clock = clock
        self._within = within.total_seconds()
        self._turned: dict[str, float] = {}

    def expect(self, loop: str) -> None:
        """A loop begins: from now on it must turn."""
        self._turned.setdefault(loop, self._clock.monotonic())

    def forget(self, loop: str) -> None:
        """A loop was ended on purpose."""
        self._turned.pop(loop, None)

    def beat(self, loop: str) -> None:
        """A loop turned. One that is not expected (it was ended) is left so."""
        if loop in self._turned:
            self._turned[loop] = self._clock.monotonic()

    def of(self, loop: str) -> Callable[[], None]:
        """What that loop calls when it turns."""
        return lambda: self.beat(loop)

    def silent(self) -> dict[str, float]:
        """Loops that have not turned for too long, with their seconds of silence."""
        now = self._clock.monotonic()
        return {loop: now - at for loop, at in self._turned.items() if now - at > self._within}
