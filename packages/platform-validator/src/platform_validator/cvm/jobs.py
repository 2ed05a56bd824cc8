"""A job as the session carries it: the order that goes in, the result that comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.session.messages import JobError


@dataclass(frozen=True, slots=True)
class JobOrder:
    """What the SDK is told to run. `submission_sha256` None: the job has none.

    `submission_name`: as its miner called it; version 1 of the session tells it.
    """

    job_id: JobId
    attempt: int
    challenge_id: ChallengeId
    job_name: str | None
    payload: dict[str, Any]
    submission_sha256: str | None
    submission_name: str | None = None


@dataclass(frozen=True, slots=True)
class GuestResult:
    """What came back: guest data, to be validated. Failure is the presence of `error`.

    `result_bytes` is the length of a large result of which only the used part is here. `session`: the
    version of the session that it came over.
    """

    job_id: JobId
    attempt: int
    result: dict[str, Any] | None
    error: JobError | None
    evidence: dict[str, Any] | None
    execution_time_ms: int
    seq: int
    logs: list[str] = field(default_factory=list)
    result_bytes: int | None = None
    session: int = 2
