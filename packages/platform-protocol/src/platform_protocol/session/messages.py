"""The messages of a version 2 session, inside sealed frames: one JSON object `{type, …}` each."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.session.errors import MessageInvalid

CHUNK_BYTES = 1024 * 1024
Seq = Annotated[int, Field(ge=0)]
RequestId = Annotated[str, Field(min_length=1, max_length=64)]
JobPhase = Literal["none", "receiving", "running", "done"]


def _from_base64(value: object) -> object:
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


def _to_base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


Data = Annotated[bytes, BeforeValidator(_from_base64), PlainSerializer(_to_base64, when_used="json")]
"""Bytes here, standard base64 on the wire."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Sequenced(_Message):
    """S to V, counted over the session; 0 until the session gives it its number."""

    seq: Seq = 0


class GuestJob(_Message):
    """One job that the SDK holds."""

    job_id: JobId
    attempt: Annotated[int, Field(ge=1)]
    job: JobPhase
    submission_bytes: Seq = 0


class GuestState(_Message):
    """What the SDK is doing, told in its hello: of its newest job, and in `shared` mode of all (`jobs`)."""

    configured: bool = False
    job_id: JobId | None = None
    job: JobPhase = "none"
    submission_bytes: Seq = 0
    jobs: list[GuestJob] | None = None

    def of(self, job_id: JobId, attempt: int) -> GuestJob | None:
        """What it says of one job."""
        if self.jobs is not None:
            named = (each for each in self.jobs if (each.job_id, each.attempt) == (job_id, attempt))
            return next(named, None)
        if self.job_id != job_id:
            return None
        return GuestJob(job_id=job_id, attempt=attempt, job=self.job, submission_bytes=self.submission_bytes)


class GuestHello(_Message):
    """S's first frame. `received`: the last seq that V acknowledged. `known` False to a resume: rebooted."""

    type: Literal["hello"] = "hello"
    known: bool
    received: Seq
    state: GuestState


class ValidatorHello(_Message):
    """V's first frame. `received`: the last seq whose effect is durable."""

    type: Literal["hello"] = "hello"
    received: Seq


class Ready(_Sequenced):
    """After on_startup and on_ready: the SDK takes jobs."""

    type: Literal["ready"] = "ready"
    handlers: list[str]


class JobError(_Message):
    """Why a job has no result."""

    code: Annotated[str, Field(max_length=64)] = ""
    message: Annotated[str, Field(max_length=16_384)] = ""


class JobResult(_Sequenced):
    """The end of a job. A failure is the presence of `error`, even an empty one.

    `attempt` tells a late result of an earlier attempt apart, where one CVM may have been given both.
    """

    type: Literal["job_result"] = "job_result"
    job_id: JobId
    attempt: Annotated[int, Field(ge=1)] | None = None
    result: dict[str, Any] | None = None
    error: JobError | None = None
    evidence: dict[str, Any] | None = None


class JobProgress(_Message):
    """How far a job is; may be lost with its connection."""

    type: Literal["job_progress"] = "job_progress"
    job_id: JobId
    percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    message: Annotated[str, Field(max_length=8192)] = ""


class Log(_Message):
    """A log line; may be lost with its connection."""

    type: Literal["log"] = "log"
    level: Annotated[str, Field(max_length=16)] = "info"
    message: Annotated[str, Field(max_length=8192)]
    job_id: JobId | None = None


class ValuesGet(_Sequenced):
    """Read a value."""

    type: Literal["values_get"] = "values_get"
    request_id: RequestId
    key: str


class ValuesSet(_Sequenced):
    """Write a value."""

    type: Literal["values_set"] = "values_set"
    request_id: RequestId
    key: str
    value: JsonValue


class ValuesDelete(_Sequenced):
    """Remove a value."""

    type: Literal["values_delete"] = "values_delete"
    request_id: RequestId
    key: str


class ValuesList(_Sequenced):
    """List keys."""

    type: Literal["values_list"] = "values_list"
    request_id: RequestId
    prefix: str = ""
    limit: Annotated[int, Field(ge=1, le=10_000)] = 1000


class ValuesIncrement(_Sequenced):
    """Add to a number; a missing one counts as 0."""

    type: Literal["values_increment"] = "values_increment"
    request_id: RequestId
    key: str
    by: Annotated[float, Field(allow_inf_nan=False)] | int = 1


class ValuesCas(_Sequenced):
    """Write a value if its version is still `expected_version` (0: it is not there)."""

    type: Literal["values_cas"] = "values_cas"
    request_id: RequestId
    key: str
    expected_version: Seq
    value: JsonValue


class WeightsResponse(_Sequenced):
    """The weights that were asked for, or why there are none."""

    type: Literal["weights_response"] = "weights_response"
    request_id: RequestId
    weights: dict[str, float] | None = None
    error: JobError | None = None


class GuestError(_Sequenced):
    """Something that V sent could not be used. `request_id`: which request, or which job (its id)."""

    type: Literal["error"] = "error"
    code: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=8192)]
    request_id: RequestId | None = None


class Pong(_Message):
    """The answer to `ping`."""

    type: Literal["pong"] = "pong"
    n: Seq


class Configure(_Message):
    """The operator's environment and the challenge's id: after hello, first, once."""

    type: Literal["configure"] = "configure"
    env: dict[str, str] = Field(repr=False)
    challenge_id: ChallengeId


class JobExecute(_Message):
    """Run a job. `submission_sha256` None: the job has none."""

    type: Literal["job_execute"] = "job_execute"
    job_id: JobId
    attempt: Annotated[int, Field(ge=1)]
    challenge_id: ChallengeId
    job_name: str | None = None
    payload: dict[str, Any]
    submission_sha256: str | None = None


class SubmissionChunk(_Message):
    """Up to 1 MiB of the submission at `offset`."""

    type: Literal["submission"] = "submission"
    job_id: JobId
    offset: Seq
    last: bool
    data: Annotated[Data, Field(max_length=CHUNK_BYTES)] = Field(repr=False)


class JobCancel(_Message):
    """End the job."""

    type: Literal["job_cancel"] = "job_cancel"
    job_id: JobId
    reason: str


class WeightsRequest(_Message):
    """Ask the challenge for weights over results."""

    type: Literal["weights_request"] = "weights_request"
    request_id: RequestId
    results: list[dict[str, Any]]


class ValuesResult(_Message):
    """The answer to a values request. A value that is not there has neither value nor version."""

    type: Literal["values_result"] = "values_result"
    request_id: RequestId
    value: JsonValue = None
    version: int | None = None
    keys: list[str] | None = None
    error: JobError | None = None


class Ack(_Message):
    """Everything up to `seq` is durable with V."""

    type: Literal["ack"] = "ack"
    seq: Seq


class Ping(_Message):
    """Answered with the same number; an authenticated sign of life."""

    type: Literal["ping"] = "ping"
    n: Seq


class ValidatorError(_Message):
    """Something that S sent could not be used."""

    type: Literal["error"] = "error"
    code: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=8192)]
    request_id: RequestId | None = None


ValuesRequest = ValuesGet | ValuesSet | ValuesDelete | ValuesList | ValuesIncrement | ValuesCas
SequencedMessage = Ready | JobResult | ValuesRequest | WeightsResponse | GuestError
GuestMessage = SequencedMessage | GuestHello | JobProgress | Log | Pong
ValidatorMessage = (
    ValidatorHello
    | Configure
    | JobExecute
    | SubmissionChunk
    | JobCancel
    | WeightsRequest
    | ValuesResult
    | Ack
    | Ping
    | ValidatorError
)

_FROM_GUEST: TypeAdapter[GuestMessage] = TypeAdapter(Annotated[GuestMessage, Field(discriminator="type")])
_FROM_VALIDATOR: TypeAdapter[ValidatorMessage] = TypeAdapter(
    Annotated[ValidatorMessage, Field(discriminator="type")]
)


def encode_message(message: GuestMessage | ValidatorMessage) -> bytes:
    """The plaintext of a message; optional members that are None are left out."""
    data = message.model_dump(mode="json")
    for key in ("result", "error", "keys", "version", "attempt"):
        if key in data and data[key] is None:
            del data[key]
    if isinstance(message, GuestHello) and message.state.jobs is None:
        del data["state"]["jobs"]
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def read_guest_message(plaintext: bytes) -> GuestMessage:
    """What S said.

    Raises:
        MessageInvalid: No JSON object, an unknown type, or wrong fields.
    """
    return guest_message(_loads(plaintext))


def guest_message(value: object) -> GuestMessage:
    """What S said, from its JSON value.

    Raises:
        MessageInvalid: An unknown type, or wrong fields.
    """
    return _checked(_FROM_GUEST, value)


def read_validator_message(plaintext: bytes) -> ValidatorMessage:
    """What V said.

    Raises:
        MessageInvalid: No JSON object, an unknown type, or wrong fields.
    """
    return _checked(_FROM_VALIDATOR, _loads(plaintext))


_M = TypeVar("_M")


def _checked(adapter: TypeAdapter[_M], value: object) -> _M:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors()[:5])
        raise MessageInvalid(f"a message with wrong fields: {fields or 'no object with a type'}") from error


def _loads(plaintext: bytes) -> object:
    try:
        value: object = json.loads(plaintext)
    except (ValueError, RecursionError) as error:
        raise MessageInvalid("expected one JSON object") from error
    return value
