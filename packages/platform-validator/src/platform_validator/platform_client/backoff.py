"""How long to wait before trying again: full jitter, doubling, capped."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Backoff:
    """Full jitter: a random part of a bound that doubles from `first` up to `cap`.

    Full jitter spreads a thousand clients that lost one server better than a jittered fixed wait.
    """

    first: timedelta
    cap: timedelta

    def bound(self, failures: int) -> float:
        """The longest wait in seconds after that many failures in a row (1 is the first)."""
        doublings = min(max(failures - 1, 0), 32)
        return min(self.first.total_seconds() * 2.0**doublings, self.cap.total_seconds())

    def wait(self, failures: int, rng: random.Random) -> float:
        """Seconds to wait."""
        return rng.uniform(0.0, self.bound(failures))
