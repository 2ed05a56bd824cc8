"""Whether quotes come at all: a host that makes none keeps the validator from claiming, for a while."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

FIRST_PAUSE = timedelta(seconds=30)
LONGEST_PAUSE = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class QuoteGate:
    """A value; each event gives the next one. Times are monotonic seconds.

    Closed by a CVM that showed no quote where one is needed; after a pause, doubled each time, it lets tries
    through, and the first quote opens it.
    """

    missing: int = 0
    closed_until: float = 0.0

    def admits(self, now: float) -> bool:
        """Whether jobs may be claimed."""
        return self.missing == 0 or now >= self.closed_until

    def shown(self) -> QuoteGate:
        """A quote came."""
        return QuoteGate()

    def without(self, now: float) -> QuoteGate:
        """None came. A CVM is asked again until its deadline: while closed, that changes nothing."""
        if not self.admits(now):
            return self
        pause = min(FIRST_PAUSE * 2 ** min(self.missing, 16), LONGEST_PAUSE)
        return QuoteGate(self.missing + 1, now + pause.total_seconds())
