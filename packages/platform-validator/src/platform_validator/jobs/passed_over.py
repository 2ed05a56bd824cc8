"""Jobs that were passed over for want of room: after a minute, what becomes free is kept for them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from platform_protocol.ids import JobId

KEPT_AFTER = timedelta(seconds=60)


class PassedOver:
    """Since when each pending job has lacked room. Times are monotonic seconds."""

    def __init__(self, after: timedelta = KEPT_AFTER) -> None:
        self._after = after.total_seconds()
        self._since: dict[JobId, float] = {}

    def noted(self, job_id: JobId, now: float) -> bool:
        """It lacked room at `now`; returns whether it has for so long that room is kept for it."""
        return now - self._since.setdefault(job_id, now) >= self._after

    def keep_only(self, pending: Collection[JobId]) -> None:
        """Forget jobs that are not pending any more."""
        for job_id in [each for each in self._since if each not in pending]:
            del self._since[job_id]

    def claimed(self, job_id: JobId) -> None:
        """It has its room."""
        self._since.pop(job_id, None)
