"""When a CVM's program ends by itself, whatever becomes of its validator. Pure: times in, time left out."""

from __future__ import annotations

from dataclasses import dataclass

JOB_SILENCE = 15 * 60.0


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
