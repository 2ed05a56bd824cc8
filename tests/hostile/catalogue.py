"""Every attack, in the order of the catalogue of failures."""

from __future__ import annotations

from tests.hostile.archives import ARCHIVES
from tests.hostile.attack import Attack
from tests.hostile.egress import EGRESS
from tests.hostile.network import NETWORK
from tests.hostile.output import OUTPUT
from tests.hostile.reach import REACH
from tests.hostile.resources import RESOURCES
from tests.hostile.session import SESSION

_ALL = [*RESOURCES, *NETWORK, *EGRESS, *OUTPUT, *ARCHIVES, *SESSION, *REACH]
ATTACKS: list[Attack] = sorted(_ALL, key=lambda attack: attack.case)

SHORT = (
    "1 TB sparse file",
    "double fork and setsid",
    "ptrace of the SDK",
    "cloud metadata",
    "the validator's own listener, from a submission",
    "a secret in pieces",
    "a forged result line",
    "nothing is unpacked on the host",
    "a path in an artifact's name",
    "links where the host might open a path",
    "the hotkey, from a challenge",
)
"""Some of each case: what `make test` runs."""
