"""Who makes room for a candidate when the quota forbids both, and in which order: pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

PATIENCE = timedelta(minutes=2)
"""How long a candidate waits beside an Active instance before that one is drained first."""


class Step(StrEnum):
    """What is done about room now."""

    YIELD = "yield"
    WAIT = "wait"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class RoomFacts:
    """`waited_s` since the first refusal; `idle`: some ready CVM has nothing to do.

    `serving_holds`: the Active instance of the same challenge has CVMs; `draining`: it is drained already.
    """

    waited_s: float
    idle: bool
    serving_holds: bool
    draining: bool


def next_step(facts: RoomFacts) -> Step:
    """Idle ready CVMs yield first, oldest first; then the candidate waits; then the Active one is drained."""
    if facts.idle:
        return Step.YIELD
    patient = facts.waited_s < PATIENCE.total_seconds()
    # Draining an instance that holds nothing would make no room, and stop its jobs for nothing.
    if facts.draining or not facts.serving_holds or patient:
        return Step.WAIT
    return Step.DRAIN
