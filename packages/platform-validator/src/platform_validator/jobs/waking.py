"""When the job manager makes its next pass: pushed, polled, or because there may be room now."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

from platform_validator.clock import Clock

_ROOM_RETRY = 0.5
_SPREAD = 0.05
_APART = 0.5
"""Seconds between passes that pushes ask for: a burst that takes a while to arrive folds all the same."""


class Waking:
    """Folds any number of calls between two passes into one.

    Args:
        clock: Time.
        rng: Jitter.
        poll: Seconds between polls, with a tenth of jitter either way.
    """

    def __init__(self, clock: Clock, rng: random.Random, poll: float) -> None:
        self._clock = clock
        self._rng = rng
        self._poll = poll
        self._woken = asyncio.Event()
        self._hold_off = 0.0
        self._pushed_at = -_APART
        self._source = "poll"

    def wake(self, source: str) -> None:
        """Ask for a pass soon."""
        self._source = source
        self._woken.set()

    def hold_off(self, seconds: float) -> None:
        """The server asked not to be asked for so long: pushes wait as well."""
        self._hold_off = seconds

    def taken(self) -> str:
        """What the pass that begins now was asked by."""
        source, self._source = self._source, "poll"
        return source

    async def rest(self, *, lacking_room: bool, conflicts: Callable[[], int]) -> None:
        """Wait for the next pass.

        Args:
            lacking_room: Jobs wait for room that was asked for: look again soon.
            conflicts: How often others claimed faster than we, lately: the more, the more pushes are spread.
        """
        asked_at = self._clock.monotonic()
        pause = _ROOM_RETRY if lacking_room else self._poll * self._rng.uniform(0.9, 1.1)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._woken.wait()
        hold_off, self._hold_off = self._hold_off, 0.0
        if (left := asked_at + hold_off - self._clock.monotonic()) > 0.0:
            await self._clock.sleep(left)
        if self._woken.is_set() and self._source == "push":
            await self._gather(conflicts())
        self._woken.clear()

    async def _gather(self, conflicts: int) -> None:
        """Pushed: not at once again, and spread out a little."""
        apart = self._pushed_at + _APART - self._clock.monotonic()
        spread = self._rng.uniform(0.0, _SPREAD) * conflicts
        if (pause := max(apart, spread)) > 0.0:
            await self._clock.sleep(pause)
        self._pushed_at = self._clock.monotonic()
