"""The Platform API's messages over HTTP. Unknown fields are ignored when read."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from platform_protocol.ids import ChallengeId, ClaimId, Hotkey, JobId, LeaseToken, SubmissionId
from platform_protocol.resources import Resources

Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Counted = Annotated[int, Field(ge=1, strict=True)]
"""From one on. Strict: `true` is no number, and `"60"` neither."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class IsolationLevel(StrEnum):
    """How strongly a CVM is separated from its host, strongest first."""

    TEE = "Tee"
    VM = "Vm"
    CONTAINER = "Container"
    PROCESS = "Process"
    NONE = "None"

    @property
    def rank(self) -> int:
        """4 for Tee down to 0 for None: a configured level is a minimum."""
        return len(IsolationLevel) - 1 - list(IsolationLevel).index(self)


class AttestationKind(StrEnum):
    """What proved the CVM that made a result."""

    TDX = "tdx"
    SIMULATED = "simulated"
    NONE = "none"


class ResultOutcome(StrEnum):
    """The outcomes that are submitted."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMEOUT = "timeout"


class ReleaseReason(StrEnum):
    """Why a job is given back."""

    INFRA = "infra"
    ATTESTATION_UNAVAILABLE = "attestation_unavailable"
    CAPACITY = "capacity"
    DRAIN = "drain"
    OPERATOR = "operator"
    SANDBOX_DIED = "sandbox_died"


class ActiveChallenge(_Message):
    """A challenge as `/challenges/active` lists it. `compose_hash` None: not published."""

    id: ChallengeId
    name: str
    status: str
    github_repo: str
    github_commit: str
    compose_hash: str | None = None
    mechanism_id: int = 0
    emission_share: Finite = 0.0
    resources: Resources


class ActiveChallenges(_Message):
    """The answer of `GET /challenges/active`."""

    challenges: list[ActiveChallenge]


class PendingJob(_Message):
    """A job that may be claimed."""

    id: JobId
    challenge_id: ChallengeId
    submission_id: SubmissionId | None = None
    miner_hotkey: Hotkey | None = None
    status: str = "pending"
    created_at: datetime
    priority: int = 0
    resources: Resources
    timeout_s: Counted


class PendingJobs(_Message):
    """The answer of `GET /jobs/pending`, in the order in which to claim."""

    jobs: list[PendingJob]


class ClaimRequest(_Message):
    """`POST /jobs/{id}/claim`."""

    claim_id: ClaimId


class Lease(_Message):
    """The fencing token and the term in seconds."""

    token: LeaseToken
    term_s: Seconds


class SubmissionRef(_Message):
    """Where the submission is: `url` is a path on the API's own origin."""

    url: str
    sha256: Sha256
    size: Annotated[int, Field(ge=0)]
    filename: str


class Claim(_Message):
    """A granted claim."""

    id: JobId
    challenge_id: ChallengeId
    submission_id: SubmissionId | None = None
    miner_hotkey: Hotkey | None = None
    status: str = "claimed"
    attempt: Counted
    lease: Lease
    job_name: str | None = None
    payload: dict[str, Any] = Field(default_factory=dict)
    submission: SubmissionRef | None = None
    timeout_s: Counted
    resources: Resources


class RenewRequest(_Message):
    """`POST /jobs/{id}/renew`."""

    lease_token: LeaseToken


class Renewal(_Message):
    """The answer of a renewal: the term in seconds, from now."""

    term_s: Seconds


class ReleaseRequest(_Message):
    """`POST /jobs/{id}/release`."""

    lease_token: LeaseToken
    reason: ReleaseReason


class JobLogs(_Message):
    """`POST /jobs/{id}/logs`."""

    lease_token: LeaseToken
    seq: Annotated[int, Field(ge=0)]
    lines: list[str]


class ResourceUsage(_Message):
    """What a job used."""

    cpu_time_ms: Annotated[int, Field(ge=0)]
    memory_peak_bytes: Annotated[int, Field(ge=0)]
    disk_bytes: Annotated[int, Field(ge=0)]
    network_bytes: Annotated[int, Field(ge=0)]


class ResultBody(_Message):
    """`POST /jobs/{id}/results`. Every key is required; `receipt` may be null."""

    lease_token: LeaseToken
    attempt: Counted
    outcome: ResultOutcome
    score: Finite
    metrics: dict[str, Finite]
    logs: list[str]
    execution_time_ms: Annotated[int, Field(ge=0)]
    error: Annotated[str, Field(max_length=4096)] | None
    resource_usage: ResourceUsage
    github_commit: str
    compose_hash: str
    isolation_level: IsolationLevel
    attestation: AttestationKind
    receipt: dict[str, Any] | None


class Problem(_Message):
    """RFC 9457 problem details, with `code`, a stable snake_case word. Extra members stay readable."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str = "about:blank"
    title: str = ""
    status: int = 0
    detail: str = ""
    code: str = ""
