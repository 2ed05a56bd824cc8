"""Whether a host takes CVMs: closed when its VMM is silent or fails, and tried again with patience. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

SILENT_TO_CLOSE = 3
"""Looks without an answer, one after the other."""
FAILURES_TO_CLOSE = 3
"""CVMs that its VMM could not make, one after the other: what the claim gate of a challenge bears."""
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=30), timedelta(minutes=10)
FULL_PAUSE = timedelta(seconds=5)
"""The first pause of a host that has no room although our account says so."""
_LOOK_EVERY, _LOOK_AGAIN = 15.0, 2.0
_MOST_PAUSES = 16


@dataclass(frozen=True, slots=True)
class Cordon:
    """One host's, as a value: each event gives the next. Times are monotonic seconds; `since` is for people.

    Open it takes every CVM. Closed for silence, none until its VMM answers. Closed for failures, none until
    `until`; then it is half-open and takes one, whose end decides: made, it is open; failed, it is closed for
    twice as long.
    """

    why: str | None = None
    since: datetime | None = None
    until: float | None = None
    silent: int = 0
    failures: int = 0
    pauses: int = 0
    lacks_room: bool = False

    @property
    def silenced(self) -> bool:
        """Whether it is closed because its VMM does not answer."""
        return self.why is not None and self.until is None

    def closed(self, now: float) -> str | None:
        """Why it takes none now, or None."""
        return None if self.until is not None and now >= self.until else self.why

    def half_open(self, now: float) -> bool:
        """Whether it takes one, to see whether it works again."""
        return self.why is not None and self.closed(now) is None

    @property
    def look_after(self) -> float:
        """Seconds until its VMM is asked again."""
        return min(_LOOK_EVERY, _LOOK_AGAIN * 2 ** min(self.silent - 1, 8)) if self.silent else _LOOK_EVERY

    def answered(self) -> Cordon:
        """Its VMM answered: no more of a closing for silence."""
        return Cordon(failures=self.failures) if self.silenced else replace(self, silent=0)

    def unanswered(self, why: str, at: datetime) -> Cordon:
        """Its VMM did not answer a look; for the third time in a row it closes, whatever it was."""
        silent = self.silent + 1
        if silent < SILENT_TO_CLOSE:
            return replace(self, silent=silent)
        return Cordon(why, self.since or at, None, silent, self.failures)

    def made(self) -> Cordon:
        """A CVM came up there."""
        return Cordon(silent=self.silent)

    def failed(self, why: str, now: float, at: datetime) -> Cordon:
        """Its VMM could not make a CVM, and it is not that it has no room."""
        if self.closed(now) is not None:
            # Of several that were under way the first has said it.
            return self
        failures = self.failures + 1
        if self.why is None and failures < FAILURES_TO_CLOSE:
            return replace(self, failures=failures)
        return self._paused(why, now, at, FIRST_PAUSE, failures)

    def full(self, why: str, now: float, at: datetime) -> Cordon:
        """It has no room, although there should be some: closed at once, and not for long at first."""
        if self.closed(now) is not None:
            return self
        return replace(self._paused(why, now, at, FULL_PAUSE, self.failures), lacks_room=True)

    def freed(self, now: float) -> Cordon:
        """A CVM there is gone: where room was what lacked, the next may be tried at once."""
        return replace(self, until=now, pauses=0) if self.lacks_room and self.until is not None else self

    def _paused(self, why: str, now: float, at: datetime, first: timedelta, failures: int) -> Cordon:
        pause = min(first * 2 ** min(self.pauses, _MOST_PAUSES), LONGEST_PAUSE).total_seconds()
        return Cordon(why, self.since or at, now + pause, self.silent, failures, self.pauses + 1)
