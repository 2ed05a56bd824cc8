"""Where pushes go: to the job loop and to the challenge monitor, as hints and nothing more."""

from __future__ import annotations

from collections.abc import Callable

from platform_protocol.notifications import ChallengeUpdated, JobCancelled, NewJob
from platform_validator.challenges.manager import ChallengeManager
from platform_validator.jobs.manager import JobManager


class Notices:
    """A `NotificationListener` over the two loops.

    Args:
        jobs: Woken by new and cancelled jobs.
        challenges: Woken by changed challenges.
        on_hotkey_in_use: Called when another instance took the hotkey over (exit 5 after draining).
    """

    def __init__(
        self, *, jobs: JobManager, challenges: ChallengeManager, on_hotkey_in_use: Callable[[], None]
    ) -> None:
        self._jobs = jobs
        self._challenges = challenges
        self._on_hotkey_in_use = on_hotkey_in_use

    def poll_now(self) -> None:
        """Something may have been missed: look at everything."""
        self._jobs.wake()
        self._challenges.wake()

    def new_job(self, hint: NewJob) -> None:
        """There may be a new job."""
        del hint
        self._jobs.wake()

    def challenge_updated(self, hint: ChallengeUpdated) -> None:
        """A challenge may have changed."""
        del hint
        self._challenges.wake()

    def job_cancelled(self, hint: JobCancelled) -> None:
        """A job may have been cancelled."""
        self._jobs.hint_cancelled(hint.job_id)

    def hotkey_in_use(self) -> None:
        """Claim no more, and tell the daemon."""
        self._jobs.stop_claiming()
        self._on_hotkey_in_use()
