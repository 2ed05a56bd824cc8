"""Whether the journal fails now, for whoever shows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

_STANDS_FOR = timedelta(minutes=1)


class StoreTrouble:
    """The last failure, until a write succeeds; what failed is tried again much sooner than it is forgotten.

    Set by the store's thread and read on the loop: both only replace or read one reference. `told` is called
    on that thread for each failure.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self.told: Callable[[], None] = lambda: None
        self._last: tuple[str, float] | None = None

    def failed(self, error: str) -> None:
        """A transaction failed."""
        self._last = error, self._monotonic()
        self.told()

    def passed(self) -> None:
        """Something was written."""
        self._last = None

    @property
    def now(self) -> str | None:
        """Why the journal fails, or None."""
        last = self._last
        if last is None or self._monotonic() - last[1] > _STANDS_FOR.total_seconds():
            return None
        return last[0]
