"""A guest's event log against its quote: the registers replay, and the identity events say what we expect."""

from __future__ import annotations

from dataclasses import dataclass

from platform_protocol.event_log import RUNTIME_IMR, Event, EventLogInvalid, parse_event_log, replay
from platform_validator.errors import ValidatorError

_ONCE = (
    "system-preparing",
    "app-id",
    "compose-hash",
    "instance-id",
    "boot-mr-done",
    "key-provider",
    "system-ready",
)


class EventLogRefused(ValidatorError):
    """The log does not prove what it should; `check` names what failed."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(detail)
        self.check = check


@dataclass(frozen=True, slots=True)
class Identity:
    """What the log says the guest is, all in hex."""

    app_id: str
    compose_hash: str
    instance_id: str


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
                raise EventLogRefused(f"rtmr{imr}", f"the event log does not replay to the quote's RTMR{imr}")
    except EventLogInvalid as error:
        raise EventLogRefused("event_log", str(error)) from error
    boot = _until_ready(_runtime_events(events))
    payloads = {
        name: _only(boot, name).event_payload.lower() for name in ("app-id", "compose-hash", "instance-id")
    }
    _only(boot, "boot-mr-done")
    names = [event.event for event in boot]
    if names.index("boot-mr-done") < max(names.index(name) for name in payloads):
        raise EventLogRefused("event_order", "identity events after boot-mr-done")
    return Identity(payloads["app-id"], payloads["compose-hash"], payloads["instance-id"])


def _runtime_events(events: list[Event]) -> list[Event]:
    """The events of RTMR3, each of which must be read as what was measured.

    An event of another type would count in the replay by its digest alone: under it the true identity could
    be hidden, and another one extended behind it.
    """
    found = [event for event in events if event.imr == RUNTIME_IMR]
    if not all(event.is_runtime for event in found):
        raise EventLogRefused("event_order", "RTMR3 has an event that no runtime measured")
    return found


def _until_ready(events: list[Event]) -> list[Event]:
    """What the guest's system measured; later events are the app's own (dstack v0.5.x lets it add some)."""
    names = [event.event for event in events]
    if "system-ready" not in names:
        raise EventLogRefused("event_order", "no system-ready event")
    last = names.index("system-ready")
    if "system-ready" in names[last + 1 :]:
        raise EventLogRefused("event_order", "system-ready is there twice")
    # A digest covers `name:payload`: with a colon in the name, part of a payload can pass for the name.
    if any(":" in name for name in names[:last]):
        raise EventLogRefused("event_order", "an event before system-ready has a colon in its name")
    for name in _ONCE[:-1]:
        if name in names[last:]:
            raise EventLogRefused("event_order", f"{name} after system-ready")
        if names[:last].count(name) > 1:
            raise EventLogRefused("event_order", f"{name} is there twice")
    return events[: last + 1]


def _only(events: list[Event], name: str) -> Event:
    found = [event for event in events if event.event == name]
    if len(found) != 1:
        raise EventLogRefused("event_order", f"expected one {name} event, found {len(found)}")
    return found[0]
