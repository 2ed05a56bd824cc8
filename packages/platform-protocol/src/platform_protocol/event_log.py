"""dstack's event log: reading it, digests of runtime events, and the replay of an RTMR.

Facts from dstack v0.5.2 to its 2026 head: a runtime event (imr 3, type 0x08000001) has the digest
SHA-384(LE32(type) ‖ ":" ‖ name ‖ ":" ‖ payload) in version 1, and SHA-384 of the compact JSON
`{"name":…,"payload":<hex>,"type":134217729}` in version 2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from platform_protocol.canonical import canonical_json
from platform_protocol.errors import ProtocolError

RUNTIME_EVENT_TYPE = 0x08000001
RUNTIME_IMR = 3
RTMR_BYTES = 48
_MAX_LOG = 4 * 1024 * 1024
_MAX_EVENTS = 10_000
Hex = Annotated[str, Field(pattern=r"^([0-9a-fA-F]{2})*$")]


class EventLogInvalid(ProtocolError):
    """Not an event log, or one whose digests contradict its events."""


class Event(BaseModel):
    """One event. `digest` may be empty for runtime events of a stripped log: it is recomputed anyway."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    imr: Annotated[int, Field(ge=0, le=3)]
    event_type: Annotated[int, Field(ge=0, le=2**32 - 1)]
    digest: Hex = ""
    event: str = ""
    event_payload: Hex = ""
    version: int = 1
    preimage: Hex = ""

    @property
    def is_runtime(self) -> bool:
        """Whether it was made by the guest's software, with a payload that its digest covers."""
        return self.imr == RUNTIME_IMR and self.event_type == RUNTIME_EVENT_TYPE

    @property
    def payload(self) -> bytes:
        """The payload's bytes."""
        return bytes.fromhex(self.event_payload)


_EVENTS = TypeAdapter(list[Event])


def parse_event_log(text: str) -> list[Event]:
    """Read the JSON list that a guest agent gives with a quote.

    Raises:
        EventLogInvalid: Not such a list, over 4 MiB or 10,000 events.
    """
    if len(text) > _MAX_LOG:
        raise EventLogInvalid(f"expected an event log of at most {_MAX_LOG} characters, got {len(text)}")
    try:
        value: Any = json.loads(text)
        events = _EVENTS.validate_python(value)
    except (ValueError, RecursionError, ValidationError) as error:
        raise EventLogInvalid("expected a JSON list of events with imr, event_type, digest, event") from error
    if len(events) > _MAX_EVENTS:
        raise EventLogInvalid(f"expected at most {_MAX_EVENTS} events, got {len(events)}")
    return events


def runtime_digest(name: str, payload: bytes, version: int = 1) -> bytes:
    """The digest (48 bytes) of a runtime event.

    Raises:
        EventLogInvalid: A version other than 1 and 2.
    """
    if version == 1:
        head = RUNTIME_EVENT_TYPE.to_bytes(4, "little")
        return hashlib.sha384(head + b":" + name.encode() + b":" + payload).digest()
    if version == 2:  # noqa: PLR2004 - the two versions that exist
        return hashlib.sha384(_preimage(name, payload)).digest()
    raise EventLogInvalid(f"expected event version 1 or 2, got {version}")


def replay(events: Iterable[Event], imr: int) -> bytes:
    """The value (48 bytes) of RTMR `imr` after these events, runtime digests recomputed from their payloads.

    Raises:
        EventLogInvalid: A digest is missing, of another length, or not the one that its payload gives.
    """
    register = bytes(RTMR_BYTES)
    for event in events:
        if event.imr == imr:
            register = hashlib.sha384(register + _digest(event)).digest()
    return register


def _preimage(name: str, payload: bytes) -> bytes:
    return canonical_json({"name": name, "payload": payload.hex(), "type": RUNTIME_EVENT_TYPE})


def _digest(event: Event) -> bytes:
    stated = bytes.fromhex(event.digest)
    if not event.is_runtime:
        if len(stated) != RTMR_BYTES:
            raise EventLogInvalid(f"event {event.event!r} of RTMR{event.imr} has no SHA-384 digest")
        return stated
    computed = runtime_digest(event.event, event.payload, event.version)
    if event.preimage and (
        event.version != 2  # noqa: PLR2004 - version 1 has none
        or bytes.fromhex(event.preimage) != _preimage(event.event, event.payload)
    ):
        raise EventLogInvalid(f"the preimage of runtime event {event.event!r} is not that of its payload")
    if stated and stated != computed:
        raise EventLogInvalid(f"the digest of runtime event {event.event!r} is not that of its payload")
    return computed
