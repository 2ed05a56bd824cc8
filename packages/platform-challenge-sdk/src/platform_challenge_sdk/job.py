"""Runs one job: receives the submission, calls the handler, checks what it returns, makes the evidence."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.archive import remove, unpack
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.context import Context, Job, JobLog
from platform_challenge_sdk.errors import ResultInvalid, SdkError, SubmissionUnreadable
from platform_challenge_sdk.means import Means
from platform_challenge_sdk.submission import Submission
from platform_challenge_sdk.values import Values
from platform_challenge_sdk.wire_text import wire_text
from platform_challenge_sdk.worker import in_thread
from platform_protocol.canonical import NotCanonical, canonical_json
from platform_protocol.evidence import payload_sha256, result_record, result_report_data
from platform_protocol.ids import Hotkey
from platform_protocol.session.messages import (
    GuestMessage,
    JobError,
    JobExecute,
    JobPhase,
    JobProgress,
    JobResult,
    SubmissionChunk,
)

MAX_SUBMISSION = 64 * 1024 * 1024
SINGLE_FILE = "submission"
_MAX_CODE = 64
_MAX_ERROR = 4000
_MAX_TRACEBACK = 8000

Send = Callable[[GuestMessage], None]


class JobRun:
    """One job from job_execute to job_result. `phase` and `received` go into hello's state."""

    def __init__(
        self,
        order: JobExecute,
        *,
        challenge: Challenge,
        agent: Agent,
        validator: Hotkey,
        values: Values,
        send: Send,
        max_result: int,
        scratch: Path,
        means: Means | None = None,
    ) -> None:
        self.order = order
        self._means = means if means is not None else Means()
        self.phase: JobPhase = "none" if order.submission_sha256 is None else "receiving"
        self.received = 0
        """Bytes of the submission that are here."""
        self.result: JobResult | None = None
        """What was sent at the end."""
        self._challenge = challenge
        self._agent = agent
        self._validator = validator
        self._values = values
        self._send = send
        self._max_result = max_result
        self._folder = Path(tempfile.mkdtemp(prefix="job-", dir=scratch))
        self._archive = self._folder / "archive"
        self._digest = hashlib.sha256()
        self._complete = asyncio.Event()
        self._unreceived: str | None = None
        self._ended = threading.Event()

    def chunk(self, chunk: SubmissionChunk) -> None:
        """More of the submission. One that does not continue what is here is dropped: the sender resumes."""
        if self.phase != "receiving" or chunk.offset != self.received or self._complete.is_set():
            return
        if self.received + len(chunk.data) > MAX_SUBMISSION:
            self._unreceived = f"expected a submission of at most {MAX_SUBMISSION} bytes"
        else:
            try:
                with self._archive.open("ab") as file:
                    file.write(chunk.data)
            except OSError as error:
                self._unreceived = f"no room for the submission: {error.strerror}"
        self._digest.update(chunk.data)
        self.received += len(chunk.data)
        if chunk.last or self._unreceived:
            self._complete.set()

    def cancel(self, reason: str) -> bool:
        """End it with the error `cancelled`, unless it has ended. Whether it had not."""
        if self.phase == "done":
            return False
        self._finish(None, JobError(code="cancelled", message=wire_text(reason, _MAX_ERROR)), None)
        return True

    async def run(self) -> None:
        """Run to the end; sends exactly one job_result, unless cancelled from outside."""
        result: dict[str, Any] | None = None
        error: JobError | None = None
        task = asyncio.current_task()
        try:
            result = await self._result()
        except BaseException as failure:
            if isinstance(failure, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            error = self._error(failure)
        finally:
            self._ended.set()
            await in_thread(remove, self._folder)
        evidence = await self._evidence(result, error)
        self._finish(result, error, evidence)

    def _finish(
        self, result: dict[str, Any] | None, error: JobError | None, evidence: dict[str, Any] | None
    ) -> None:
        if self.phase == "done":
            return
        self.phase = "done"
        self._ended.set()
        self.result = JobResult(
            job_id=self.order.job_id,
            attempt=self.order.attempt,
            result=result,
            error=error,
            evidence=evidence,
        )
        self._send(self.result)

    def _error(self, failure: BaseException) -> JobError:
        """Whatever a handler raises ends its job alone; the traceback goes to the job's log."""
        if isinstance(failure, SdkError):
            code, message = failure.code, str(failure)
        else:
            code, message = "handler_error", f"{type(failure).__name__}: {failure}"
            trace = "".join(traceback.format_exception(failure))[-_MAX_TRACEBACK:]
            for line in trace.splitlines():
                JobLog(self.order.job_id, self._send).error(line)
        return JobError(code=wire_text(code, _MAX_CODE), message=wire_text(message, _MAX_ERROR))

    async def _result(self) -> dict[str, Any]:
        try:
            payload_sha256(self.order.payload)
        except NotCanonical as error:
            failure = SdkError(f"the job's payload is not I-JSON: {error}")
            failure.code = "payload_invalid"
            raise failure from error
        submission = await self._submission()
        self.phase = "running"
        self._send(JobProgress(job_id=self.order.job_id, percent=0, message="running"))
        job = Job(self.order.job_id, self.order.attempt, self.order.challenge_id, self.order.job_name)
        context = Context(job, self._values, JobLog(job.id, self._send), self._send, submission)
        returned = await self._challenge.run_job(self.order.job_name, context, self.order.payload)
        return check_result(returned, self._max_result)

    async def _submission(self) -> Submission | None:
        expected = self.order.submission_sha256
        if expected is None:
            return None
        await self._complete.wait()
        if self._unreceived is not None:
            raise SubmissionUnreadable(self._unreceived)
        if (actual := self._digest.hexdigest()) != expected:
            raise SubmissionUnreadable(f"expected a submission with SHA-256 {expected}, received {actual}")
        self._archive.touch()
        tree = self._folder / "tree"
        tree.mkdir()
        await in_thread(unpack, self._archive, tree, SINGLE_FILE)
        self._archive.unlink()
        names = [path.name for path in tree.iterdir()]
        single = SINGLE_FILE if names == [SINGLE_FILE] and (tree / SINGLE_FILE).is_file() else None
        warn = JobLog(self.order.job_id, self._send).warning
        return Submission(tree, expected, single, self._ended, warn, self._means)

    async def _evidence(self, result: dict[str, Any] | None, error: JobError | None) -> dict[str, Any]:
        try:
            record = result_record(
                job_id=self.order.job_id,
                attempt=self.order.attempt,
                validator=self._validator,
                challenge_id=self.order.challenge_id,
                submission_sha256=self.order.submission_sha256,
                payload_sha256=payload_sha256(self.order.payload),
                result=result,
                error=None if error is None else error.model_dump(),
            )
        except NotCanonical:
            return {"quote": None, "event_log": ""}
        quote = await self._agent.quote(result_report_data(record))
        encoded = None if quote.quote is None else base64.b64encode(quote.quote).decode("ascii")
        return {"quote": encoded, "event_log": quote.event_log}


def check_result(returned: Any, max_bytes: int) -> dict[str, Any]:
    """The handler's result as a dict with a finite `score`; a bare number is its score.

    Raises:
        ResultInvalid: Anything else, a number that I-JSON does not know, or more than `max_bytes` as JSON.
    """
    bare = isinstance(returned, int | float) and not isinstance(returned, bool)
    result = {"score": returned} if bare else returned
    if not isinstance(result, dict):
        raise ResultInvalid(f"expected a dict with 'score', the handler returned {type(returned).__name__}")
    score = result.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ResultInvalid(f"expected a finite number in 'score', got {repr(score)[:80]}")
    try:
        size = len(canonical_json(result))
    except NotCanonical as error:
        raise ResultInvalid(f"the result is not JSON: {error}") from error
    if size > max_bytes:
        failure = ResultInvalid(f"expected a result of at most {max_bytes} bytes, got {size}")
        failure.code = "result_too_large"
        raise failure
    return result
