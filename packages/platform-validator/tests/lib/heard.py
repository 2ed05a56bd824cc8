"""A listener of pushes that notes what it is told."""

from __future__ import annotations

from platform_protocol.notifications import ChallengeUpdated, JobCancelled, NewJob


class Heard:
    """A listener that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def poll_now(self) -> None:
        """See the port."""
        self.told.append("poll")

    def new_job(self, hint: NewJob) -> None:
        """See the port."""
        self.told.append("new_job")

    def challenge_updated(self, hint: ChallengeUpdated) -> None:
        """See the port."""
        self.told.append("challenge_updated")

    def job_cancelled(self, hint: JobCancelled) -> None:
        """See the port."""
        self.told.append("job_cancelled")

    def hotkey_in_use(self) -> None:
        """See the port."""
        self.told.append("in_use")
