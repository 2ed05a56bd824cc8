"""A real TDX quote of a published dstack image, with the document that its measurements are computed from."""

from __future__ import annotations

import json
from pathlib import Path

from platform_protocol.event_log import parse_event_log
from platform_validator.attestation.event_log import Identity
from platform_validator.attestation.os_image import (
    Pinned,
    Shape,
)
from platform_validator.attestation.quote import parse_quote

DATA = Path(__file__).parents[1] / "data" / "tdx"
LITE = json.loads((DATA / "dstack_lite_quote.json").read_text())
EVENTS = parse_event_log(LITE["event_log"])
BODY = parse_quote(bytes.fromhex(LITE["quote"]))
CONFIG = json.loads(LITE["vm_config"])
PINNED = Pinned("dstack-0.5.5", Shape(4, 8192), "aa" * 48, "00" * 48, "11" * 48, "22" * 48, "by hand")


def identity() -> Identity:
    """What its log says of who it is, of which only the events count here."""
    return Identity("", "", "", "none", "", tuple(EVENTS))
