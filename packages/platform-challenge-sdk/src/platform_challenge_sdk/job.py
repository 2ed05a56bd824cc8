"""Runs one job: receives the submission, calls the handler, checks what it returns, makes the evidence."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import math
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.archive import unpack
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.context import Context, Job, JobLog
from platform_challenge_sdk.errors import ResultInvalid, SdkError, SubmissionUnreadable
from platform_challenge_sdk.submission import Submission
from platform_challenge_sdk.values import Values
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
    ) -> None:
        self.order = order
        self.phase: JobPhase = "none" if order.submission_sha256 is None else "receiving"
        self._challenge = challenge
        self._agent = agent
        self._validator = validator
        self._values = values
        self._send = send
        self._max_result = max_result
        self._data = bytearray()
        self._complete = asyncio.Event()
        self._folder = Path(tempfile.mkdtemp(prefix="submission-", dir=scratch))

    @property
    def received(self) -> int:
        """Bytes of the submission that are here."""
        return len(self._data)

    def chunk(self, chunk: SubmissionChunk) -> None:
        """More of the submission. One that does not continue what is here is dropped: the sender resumes."""
        if self.phase != "receiving" or chunk.offset != len(self._data):
            return
        if len(self._data) + len(chunk.data) <= MAX_SUBMISSION:
            self._data += chunk.data
        if chunk.last:
            self._complete.set()

    async def run(self) -> None:
        """Run to the end; sends exactly one job_result, unless cancelled from outside."""
        result: dict[str, Any] | None = None
        error: JobError | None = None
        try:
            result = await self._result()
        except asyncio.CancelledError:
            raise
        except SdkError as failure:
            error = JobError(code=failure.code, message=str(failure)[:_MAX_ERROR])
        except BaseException as failure:  # noqa: BLE001 - even sys.exit in a handler ends only its job
            self._log("error", traceback.format_exc()[-_MAX_TRACEBACK:])
            error = JobError(
                code="handler_error", message=f"{type(failure).__name__}: {failure}"[:_MAX_ERROR]
            )
        finally:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        evidence = await self._evidence(result, error)
        self.phase = "done"
        self._send(JobResult(job_id=self.order.job_id, result=result, error=error, evidence=evidence))

    async def _result(self) -> dict[str, Any]:
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
        actual = hashlib.sha256(self._data).hexdigest()
        if actual != expected:
            raise SubmissionUnreadable(f"expected a submission with SHA-256 {expected}, received {actual}")
        data, self._data = bytes(self._data), bytearray()
        await asyncio.to_thread(unpack, data, "submission", self._folder)
        return Submission(self._folder, expected)

    async def _evidence(self, result: dict[str, Any] | None, error: JobError | None) -> dict[str, Any]:
        with contextlib.suppress(NotCanonical):
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
            quote = await self._agent.quote(result_report_data(record))
            encoded = None if quote.quote is None else base64.b64encode(quote.quote).decode("ascii")
            return {"quote": encoded, "event_log": quote.event_log}
        return {"quote": None, "event_log": ""}

    def _log(self, level: str, text: str) -> None:
        log = JobLog(self.order.job_id, self._send)
        for line in text.splitlines():
            getattr(log, level)(line)


def check_result(returned: Any, max_bytes: int) -> dict[str, Any]:
    """The handler's result as a dict with a finite `score`; a bare number is its score.

    Raises:
        ResultInvalid: Anything else, a number that I-JSON does not know, or more than `max_bytes` as JSON.
    """
    result = {"score": returned} if isinstance(returned, int | float) else returned
    if not isinstance(result, dict):
        raise ResultInvalid(f"expected a dict with 'score', the handler returned {type(returned).__name__}")
    score = result.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ResultInvalid(f"expected a finite number in 'score', got {str(score)[:80]!r}")
    try:
        size = len(canonical_json(result))
    except NotCanonical as error:
        raise ResultInvalid(f"the result is not JSON: {error}") from error
    if size > max_bytes:
        failure = ResultInvalid(f"expected a result of at most {max_bytes} bytes, got {size}")
        failure.code = "result_too_large"
        raise failure
    return result
