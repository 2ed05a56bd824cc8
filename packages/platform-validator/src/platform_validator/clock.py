"""Time, as the validator sees it: injected everywhere, so that a test or a simulation can own it."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Three clocks and a way to wait.

    Leases count `boottime` (it runs on while the machine sleeps), other deadlines `monotonic`, and
    `now` is for people and for the wire.
    """

    def now(self) -> datetime:
        """The wall clock, aware, in UTC."""

    def monotonic(self) -> float:
        """Seconds that never go back; stops while the machine is suspended."""

    def boottime(self) -> float:
        """Seconds since boot, suspended time included (Linux CLOCK_BOOTTIME)."""

    async def sleep(self, seconds: float) -> None:
        """Wait for that many seconds of this clock."""


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        """The wall clock, aware, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()

    def boottime(self) -> float:
        """Seconds of CLOCK_BOOTTIME."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        """Wait on the running event loop."""
        await asyncio.sleep(seconds)
