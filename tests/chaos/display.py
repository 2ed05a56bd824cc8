"""What people see while it runs; on standard error, so that standard output ends with the figures."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from tests.chaos.run import ChaosRun


class Display:
    """A line that is kept current on a terminal; elsewhere a line for each step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._figures = ""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, what: str) -> None:
        """A step begins, or something went wrong."""
        seconds = time.monotonic() - self._began
        self._console.print(
            f"{seconds:6.1f} s  {what}  {self._figures}", soft_wrap=True, markup=False, highlight=False
        )

    def show(self, run: ChaosRun) -> None:
        """The figures are these now."""
        tally, feed = run.tally, run.feed
        targets = ", ".join(f"{name} {count}" for name, count in sorted(tally.kills.items()))
        self._figures = (
            f"[kills {tally.kills.total()} ({targets}), points {len(tally.points)}, stops {tally.stops}; "
            f"jobs ended {feed.ended}, open {feed.open}; unrecovered {len(tally.unrecovered)}]"
        )
        if self._live is not None:
            seconds = time.monotonic() - self._began
            self._live.update(Group(Text(f"{seconds:6.1f} s  {run.step}", style="bold"), Text(self._figures)))
