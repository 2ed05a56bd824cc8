"""A guest's event log against its quote: the registers replay, and the identity events say what we expect."""

from __future__ import annotations

import json
from dataclasses import dataclass

from platform_protocol.event_log import RUNTIME_IMR, Event, EventLogInvalid, parse_event_log, replay
from platform_validator.attestation.checks import Check
from platform_validator.errors import ValidatorError

READY = "system-ready"
_FIRST = "system-preparing"
_DONE = "boot-mr-done"
_IDENTITY = ("app-id", "compose-hash", "instance-id")
_ONCE = (_FIRST, *_IDENTITY, _DONE, "mr-kms", "os-image-hash", "key-provider", "storage-fs")
_REPLAYED = (Check.RTMR0, Check.RTMR1, Check.RTMR2, Check.RTMR3)
_WORD = 64


class EventLogRefused(ValidatorError):
    """The log does not prove what it should; `check` names what failed."""

    def __init__(self, check: Check, detail: str) -> None:
        super().__init__(detail)
        self.check = check


@dataclass(frozen=True, slots=True)
class Identity:
    """What the log says the guest is, in lower-case hex.

    `key_provider` is dstack's word (`none`, `kms`, `local-sgx`, `tpm`) and empty where the log has none;
    `events` are all that the log holds, in its order.
    """

    app_id: str
    compose_hash: str
    instance_id: str
    key_provider: str
    key_provider_id: str
    events: tuple[Event, ...]


def check_event_log(text: str, rtmrs: tuple[bytes, bytes, bytes, bytes]) -> Identity:
    """Replay all four registers and read the identity from the events before `system-ready`.

    Raises:
        EventLogRefused: `event_log` (unreadable), `rtmr0` to `rtmr3` (does not replay), or
            `event_order` (an identity event is missing, repeated or out of place).
    """
    try:
        events = parse_event_log(text)
        for imr, expected in enumerate(rtmrs):
            if replay(events, imr) != expected:
                raise EventLogRefused(
                    _REPLAYED[imr], f"the event log does not replay to the quote's RTMR{imr}"
                )
    except EventLogInvalid as error:
        raise EventLogRefused(Check.EVENT_LOG, str(error)) from error
    boot = _until_ready(_runtime_events(events))
    payloads = {name: _only(boot, name).event_payload.lower() for name in _IDENTITY}
    _only(boot, _FIRST)
    _only(boot, _DONE)
    names = [event.event for event in boot]
    if names[0] != _FIRST:
        raise EventLogRefused(Check.EVENT_ORDER, f"expected {_FIRST} first, found {names[0][:_WORD]!r}")
    if names.index(_DONE) < max(names.index(name) for name in payloads):
        raise EventLogRefused(Check.EVENT_ORDER, f"identity events after {_DONE}")
    provider, provider_id = _key_provider(boot)
    return Identity(
        payloads["app-id"],
        payloads["compose-hash"],
        payloads["instance-id"],
        provider,
        provider_id,
        tuple(events),
    )


def _runtime_events(events: list[Event]) -> list[Event]:
    """The events of RTMR3, each of which must be read as what was measured.

    An event of another type would count in the replay by its digest alone: under it the true identity could
    be hidden, and another one extended behind it.
    """
    found = [event for event in events if event.imr == RUNTIME_IMR]
    if not all(event.is_runtime for event in found):
        raise EventLogRefused(Check.EVENT_ORDER, "RTMR3 has an event that no runtime measured")
    return found


def _until_ready(events: list[Event]) -> list[Event]:
    """What the guest's system measured; later events are the app's own (dstack v0.5.x lets it add some)."""
    names = [event.event for event in events]
    if READY not in names:
        raise EventLogRefused(Check.EVENT_ORDER, f"no {READY} event")
    last = names.index(READY)
    if READY in names[last + 1 :]:
        raise EventLogRefused(Check.EVENT_ORDER, f"{READY} is there twice")
    # A digest covers `name:payload`: with a colon in the name, part of a payload can pass for the name.
    if any(":" in name for name in names[:last]):
        raise EventLogRefused(Check.EVENT_ORDER, f"an event before {READY} has a colon in its name")
    for name in _ONCE:
        if name in names[last:]:
            raise EventLogRefused(Check.EVENT_ORDER, f"{name} after {READY}")
        if names[:last].count(name) > 1:
            raise EventLogRefused(Check.EVENT_ORDER, f"{name} is there twice")
    return events[: last + 1]


def _only(events: list[Event], name: str) -> Event:
    found = [event for event in events if event.event == name]
    if len(found) != 1:
        raise EventLogRefused(Check.EVENT_ORDER, f"expected one {name} event, found {len(found)}")
    return found[0]


def _key_provider(events: list[Event]) -> tuple[str, str]:
    """(kind, id in hex) of the provider; an event that cannot be read names none that is known."""
    payload = next((event.payload for event in events if event.event == "key-provider"), None)
    if payload is None:
        return "", ""
    try:
        said = json.loads(payload)
        name, identity = said["name"], said.get("id", "")
        if not isinstance(name, str) or not isinstance(identity, str):
            return "unreadable", ""
        return name[:_WORD], bytes.fromhex(identity).hex()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "unreadable", ""
