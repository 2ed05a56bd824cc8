"""How many CVMs a challenge keeps ready: what platform.toml says, and more while jobs come faster: pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from datetime import timedelta

WINDOW = timedelta(minutes=5)
MOST = 8
"""Ready CVMs of one challenge, unless its platform.toml says more."""
_REMEMBERED = 1000
_NEWEST = 0.3


def pool_size(declared: int, claims: Iterable[float], *, boot_s: float, now: float) -> int:
    """CVMs to keep ready: as many jobs as come while one boots, and never fewer than declared.

    Args:
        declared: `[execution] ready` of platform.toml; 0 keeps none, whatever the demand.
        claims: When jobs were claimed (seconds, monotonic).
        boot_s: How long a CVM takes to come up, seconds.
        now: Monotonic.
    """
    if declared == 0:
        return 0
    window = WINDOW.total_seconds()
    recent = sum(now - each < window for each in claims)
    return max(declared, min(MOST, math.ceil(recent / window * boot_s)))


class Demand:
    """What was asked of one challenge lately."""

    def __init__(self) -> None:
        self._claims: deque[float] = deque(maxlen=_REMEMBERED)
        self._boot_s = 0.0

    def claimed(self, now: float) -> None:
        """A job was claimed."""
        self._claims.append(now)

    def booted(self, seconds: float) -> None:
        """A CVM took so long; newer ones count more."""
        self._boot_s = seconds if self._boot_s == 0.0 else self._boot_s + _NEWEST * (seconds - self._boot_s)

    def wanted(self, declared: int, now: float) -> int:
        """See `pool_size`; claims that are out of its window are forgotten."""
        window = WINDOW.total_seconds()
        while self._claims and now - self._claims[0] >= window:
            self._claims.popleft()
        return pool_size(declared, self._claims, boot_s=self._boot_s, now=now)
