"""What the Platform API pushes over a validator's WebSocket. Every one is a hint and carries no authority."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from platform_protocol.errors import ProtocolError
from platform_protocol.ids import ChallengeId, JobId

_MAX_TEXT = 64 * 1024


class NotificationUnreadable(ProtocolError):
    """A frame that is no JSON object with a `type`, or a known type with wrong fields."""


class _Notification(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    seq: Annotated[int, Field(ge=0)]


class Hello(_Notification):
    """First on every connection. `seq` is the last one sent in `stream`; a new stream means: poll now."""

    type: Literal["hello"] = "hello"
    stream: str
    server_time: datetime


class NewJob(_Notification):
    """A job may be claimable."""

    type: Literal["new_job"] = "new_job"
    job_id: JobId
    challenge_id: ChallengeId


class ChallengeUpdated(_Notification):
    """A challenge's commit may have changed."""

    type: Literal["challenge_updated"] = "challenge_updated"
    challenge_id: ChallengeId
    github_commit: str


class JobCancelled(_Notification):
    """A job may have been cancelled."""

    type: Literal["job_cancelled"] = "job_cancelled"
    job_id: JobId


class UnknownNotification(BaseModel):
    """A type that this version does not know: counted and ignored."""

    model_config = ConfigDict(frozen=True)

    type: str
    seq: int | None = None


Notification = Hello | NewJob | ChallengeUpdated | JobCancelled | UnknownNotification
_KNOWN: TypeAdapter[Hello | NewJob | ChallengeUpdated | JobCancelled] = TypeAdapter(
    Annotated[Hello | NewJob | ChallengeUpdated | JobCancelled, Field(discriminator="type")]
)
_TYPES = frozenset({"hello", "new_job", "challenge_updated", "job_cancelled"})


def parse_notification(text: str) -> Notification:
    """Read one frame.

    Raises:
        NotificationUnreadable: Not a JSON object with a string `type`, or a known type with wrong fields.
    """
    if len(text) > _MAX_TEXT:
        raise NotificationUnreadable(f"expected at most {_MAX_TEXT} characters, got {len(text)}")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotificationUnreadable("expected a JSON object") from error
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise NotificationUnreadable("expected a JSON object with a string 'type'")
    if value["type"] not in _TYPES:
        seq = value.get("seq")
        return UnknownNotification(type=value["type"][:64], seq=seq if isinstance(seq, int) else None)
    try:
        return _KNOWN.validate_python(value)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors())
        raise NotificationUnreadable(f"a {value['type']} with wrong fields: {fields}") from error
