"""Jobs that were passed over for want of room: after a minute, what becomes free is kept for one of them.

Otherwise small jobs, each of which fits as soon as one of them ends, would go on for ever before a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta

from platform_protocol.ids import JobId
from platform_protocol.platform_messages import PendingJob
from platform_validator.cvm.placement import Share, Wish

KEPT_AFTER = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Lacking:
    """A pending job that has lacked room since a moment (monotonic seconds)."""

    job_id: JobId
    priority: int
    wish: Wish
    since: float


@dataclass(frozen=True, slots=True)
class Kept:
    """Room that is left to one job."""

    job_id: JobId
    priority: int
    share: Share

    def from_job(self, job: PendingJob) -> Share | None:
        """What this job must leave free: nothing, where the room is its own or it is the more urgent one."""
        return None if job.id == self.job_id or job.priority > self.priority else self.share


class PassedOver:
    """Since when each pending job has lacked room (monotonic seconds), and for which of them room is kept."""

    def __init__(self, after: timedelta = KEPT_AFTER) -> None:
        self._after = after.total_seconds()
        self._lacking: dict[JobId, Lacking] = {}
        self.kept: Kept | None = None

    def begin(self, pending: Collection[JobId], now: float, keep: Callable[[Wish], Share | None]) -> None:
        """A pass begins over these jobs: room is kept for the most urgent of those that have waited long.

        Args:
            pending: Jobs that are not among them are forgotten.
            now: The time.
            keep: Where room would be kept for such a CVM; None: it is too large for every host.
        """
        for job_id in [each for each in self._lacking if each not in pending]:
            del self._lacking[job_id]
        long = (each for each in self._lacking.values() if now - each.since >= self._after)
        self.kept = None
        for each in sorted(long, key=lambda each: (-each.priority, each.since)):
            share = keep(each.wish)
            if share is not None:
                self.kept = Kept(each.job_id, each.priority, share)
                return

    def kept_from(self, job: PendingJob) -> Share | None:
        """What this job must leave free."""
        return None if self.kept is None else self.kept.from_job(job)

    def noted(self, job: PendingJob, wish: Wish, now: float) -> None:
        """It lacked room at `now`."""
        known = self._lacking.get(job.id)
        since = now if known is None else known.since
        self._lacking[job.id] = Lacking(job.id, job.priority, wish, since)

    def forget(self, job_id: JobId) -> None:
        """It has its room, or something else is in its way."""
        self._lacking.pop(job_id, None)
        if self.kept is not None and self.kept.job_id == job_id:
            self.kept = None
