"""How long a change of a challenge must stand before it is followed: pure.

A change is followed at once, unless there were several shortly before it: a commit that flaps must not
boot a CVM at every turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

AT_ONCE = 3
WITHIN = timedelta(minutes=10)
FIRST_HOLD = timedelta(seconds=15)
LONGEST_HOLD = timedelta(minutes=2)


def followed_at(changes: Sequence[float]) -> float:
    """When the newest of these changes may be followed.

    Args:
        changes: When there was a change (seconds, monotonic), oldest first; at least one.
    """
    newest = changes[-1]
    recent = sum(newest - each < WITHIN.total_seconds() for each in changes)
    if recent <= AT_ONCE:
        return newest
    hold = FIRST_HOLD.total_seconds() * 2.0 ** min(recent - AT_ONCE - 1, 10)
    return newest + min(hold, LONGEST_HOLD.total_seconds())
