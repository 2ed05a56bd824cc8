"""When a VM that ended by itself is started again: dstack's automatic restart, as a pure decision."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Seconds. As dstack's VMM of August 2026: five tries, 5 s doubling up to 300 s.

    A boot that lasted longer than `most` was a good one: counting begins anew.
    """

    first: float = 5.0
    most: float = 300.0
    tries: int = 5

    def count(self, failures: int, lasted: float) -> int:
        """Failures in a row, after one more boot that lasted so long."""
        return 1 if lasted >= self.most else failures + 1

    def pause(self, failures: int) -> float | None:
        """How long to wait before the next start; None: exhausted, it stays exited."""
        if failures > self.tries:
            return None
        return min(self.first * 2.0 ** (failures - 1), self.most)
