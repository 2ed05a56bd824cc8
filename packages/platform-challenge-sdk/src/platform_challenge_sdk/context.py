"""What a job handler is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from platform_challenge_sdk.errors import SdkError
from platform_challenge_sdk.submission import Submission
from platform_challenge_sdk.values import Values
from platform_challenge_sdk.wire_text import wire_text
from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.session.messages import GuestMessage, JobProgress, Log

_MAX_LINE = 8192


@dataclass(frozen=True, slots=True)
class Job:
    """The job being run. `attempt` counts from 1 over all validators; its time is kept by the validator."""

    id: JobId
    attempt: int
    challenge_id: ChallengeId
    name: str | None


class JobLog:
    """Lines to the job's log, at most 8 KiB each; lines may be lost when the connection breaks."""

    def __init__(self, job_id: JobId, send: Callable[[GuestMessage], None]) -> None:
        self._job_id = job_id
        self._send = send

    def debug(self, message: str) -> None:
        """A line of level debug."""
        self._line("debug", message)

    def info(self, message: str) -> None:
        """A line of level info."""
        self._line("info", message)

    def warning(self, message: str) -> None:
        """A line of level warning."""
        self._line("warning", message)

    def error(self, message: str) -> None:
        """A line of level error."""
        self._line("error", message)

    def _line(self, level: str, message: str) -> None:
        self._send(Log(level=level, message=wire_text(message, _MAX_LINE), job_id=self._job_id))


@dataclass(slots=True)
class Context:
    """`job`, `submission`, `values`, `log` and `progress`, for one job.

    Usable from async handlers and from plain ones in their worker thread: these call `submission.run_sync`
    and `values.sync`.
    """

    job: Job
    values: Values
    log: JobLog
    _send: Callable[[GuestMessage], None]
    _submission: Submission | None = None

    @property
    def submission(self) -> Submission:
        """The job's submission.

        Raises:
            SdkError: The job has none.
        """
        if self._submission is None:
            raise SdkError("this job has no submission")
        return self._submission

    @property
    def has_submission(self) -> bool:
        """Whether the job has a submission."""
        return self._submission is not None

    def progress(self, percent: float, message: str = "") -> None:
        """How far the job is, 0 to 100."""
        bounded = min(100.0, max(0.0, float(percent)))
        self._send(JobProgress(job_id=self.job.id, percent=bounded, message=wire_text(message, _MAX_LINE)))
