"""Feeds the service manager's watchdog while the loops turn, and keeps its status line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta

import structlog

from platform_validator.daemon.systemd import Systemd

STATUS_EVERY = timedelta(seconds=10)

_log = structlog.get_logger(__name__)


class Watchdog:
    """A loop that stands still with the event loop, which then starves the watchdog as well.

    Whether the Platform API or the VMM answers has no say in it: a loop that waits for one of them turns.

    Args:
        systemd: Is told.
        silent: Loops that have not turned for too long, with their seconds of silence.
        status: The status line.
    """

    def __init__(
        self, systemd: Systemd, *, silent: Callable[[], dict[str, float]], status: Callable[[], str]
    ) -> None:
        self._systemd = systemd
        self._silent = silent
        self._status = status
        self._said = ""
        self._starving = False

    async def run(self) -> None:
        """Until cancelled: at half of what the watchdog bears (sd_watchdog_enabled(3))."""
        pause = STATUS_EVERY if self._systemd.watchdog is None else self._systemd.watchdog / 2
        while True:
            self.look()
            await asyncio.sleep(min(pause, STATUS_EVERY).total_seconds())

    def look(self) -> None:
        """Feed, unless a loop is stuck."""
        silent = self._silent()
        if silent and not self._starving:
            _log.error("loops_do_not_turn", **{name: round(age, 1) for name, age in silent.items()})
        self._starving = bool(silent)
        if not silent:
            self._systemd.feed()
        if (line := self._status()) != self._said:
            self._systemd.status(line)
            self._said = line
