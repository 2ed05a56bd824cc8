"""What a simulated boot measures: an event log in dstack's order, and the registers that replay from it."""

from __future__ import annotations

import hashlib
import json

from platform_protocol.event_log import (
    RUNTIME_EVENT_TYPE,
    RUNTIME_IMR,
    Event,
    parse_event_log,
    replay,
    runtime_digest,
)
from platform_vmm.app_compose import AppCompose
from platform_vmm.simulation.quote import Measurements

_BOOT_EVENT_TYPE = 0x80000003
_BOOT = {0: "simulated-firmware", 1: "simulated-kernel", 2: "simulated-initrd"}


def boot_event_log(app: AppCompose, *, app_id: str, instance_id: str, runtime_digest_text: str) -> str:
    """The event log (JSON text) of one boot. `instance_id` and `app_id` in hex."""
    events = [
        {
            "imr": imr,
            "event_type": _BOOT_EVENT_TYPE,
            "digest": hashlib.sha384(f"{name}:{runtime_digest_text}".encode()).hexdigest(),
            "event": name,
            "event_payload": "",
        }
        for imr, name in _BOOT.items()
    ]
    key_provider = json.dumps({"name": app.key_provider, "id": ""}, separators=(",", ":")).encode()
    for name, payload in (
        ("system-preparing", b""),
        ("app-id", bytes.fromhex(app_id)),
        ("compose-hash", bytes.fromhex(app.hash)),
        ("instance-id", bytes.fromhex(instance_id)),
        ("boot-mr-done", b""),
        ("key-provider", key_provider),
        ("system-ready", b""),
    ):
        events.append(
            {
                "imr": RUNTIME_IMR,
                "event_type": RUNTIME_EVENT_TYPE,
                "digest": runtime_digest(name, payload).hex(),
                "event": name,
                "event_payload": payload.hex(),
            }
        )
    return json.dumps(events, separators=(",", ":"))


def measurements(event_log: str, app: AppCompose) -> Measurements:
    """The registers of that boot; mr_config_id in dstack's form 1 (01 ‖ compose hash ‖ zeros)."""
    events: list[Event] = parse_event_log(event_log)
    return Measurements(
        mrtd=hashlib.sha384(b"simulated MRTD of platform-vmm: not a TEE").digest(),
        rtmrs=(replay(events, 0), replay(events, 1), replay(events, 2), replay(events, 3)),
        mr_config_id=(b"\x01" + bytes.fromhex(app.hash)).ljust(48, b"\x00"),
    )
