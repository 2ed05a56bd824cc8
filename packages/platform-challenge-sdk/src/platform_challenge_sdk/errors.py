"""What can go wrong inside a CVM, and what it means for the job.

`code` is what the validator sees: `timeout` gives the outcome timeout, everything else failed.
"""

from __future__ import annotations


class SdkError(Exception):
    """The root of the SDK's errors. Raised out of a handler it ends the job with its code."""

    code = "handler_error"


class SubmissionFailed(SdkError):
    """The submission is to blame: it crashed, answered nonsense, or broke a rule. Scored 0."""

    code = "submission_failed"


class SubmissionTimedOut(SubmissionFailed):
    """The submission did not end in time. Scored 0, outcome timeout."""

    code = "timeout"


class SubmissionUnreadable(SubmissionFailed):
    """The submission's archive cannot be unpacked safely; the message names the entry."""

    code = "submission_unreadable"


class ContainmentUnavailable(SdkError):
    """Untrusted code cannot be contained here, so it is not run."""

    code = "containment_unavailable"


class ResultInvalid(SdkError):
    """The handler returned something that is no result."""

    code = "result_invalid"


class ValueRefused(SdkError):
    """The validator refused a values request; `code` says why."""

    def __init__(self, message: str, code: str = "value_refused") -> None:
        super().__init__(message)
        self.code = code


class BootFailed(SdkError):
    """The challenge cannot be served; shown by /sdk/health."""

    code = "boot_failed"
