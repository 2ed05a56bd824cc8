"""What a version of dstack can do, as its tags v0.5.2 to v0.5.11 and the head of August 2026 (0.6.0) do it.

A VMM ignores fields that it does not know without a word, so that what matters must be known beforehand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBERS = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_OLDEST = (0, 5, 2)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Of one version.

    Attributes:
        version: As the VMM tells it.
        refuses_disabled_gpus: GPUs that a node does not have are refused (v0.5.3). Before, the VM is started
            without them.
        stopped: A VM can be made without being started (v0.5.4).
        no_tee: A VM can be made without TDX (v0.5.6). Before, it is started as a TDX VM.
        removes_later: RemoveVm answers at once and removes in the background (v0.5.7).
        update: UpdateVm, ReloadVms and the events of a VM (v0.5.6).
        signs_time: The KMS's signature covers a timestamp (v0.5.6).
        simulated_tee: A VM can be made with a simulated TDX (head).
        refuses_taken_ports: A host port that another VM has is refused at once (head). Before, the VM is
            made, and its process dies at the start.
        guards: Its tokens guard every call (head). Before, they guard the logs alone.
    """

    version: str
    refuses_disabled_gpus: bool
    stopped: bool
    no_tee: bool
    removes_later: bool
    update: bool
    signs_time: bool
    simulated_tee: bool
    refuses_taken_ports: bool
    guards: bool


def capabilities(version: str) -> Capabilities:
    """Of `0.5.5`, `v0.5.5 (git:…)` and the like; a version that cannot be read counts as the oldest."""
    found = _NUMBERS.search(version)
    number = tuple(int(part) for part in found.groups()) if found else _OLDEST
    return Capabilities(
        version=version,
        refuses_disabled_gpus=number >= (0, 5, 3),
        stopped=number >= (0, 5, 4),
        no_tee=number >= (0, 5, 6),
        removes_later=number >= (0, 5, 7),
        update=number >= (0, 5, 6),
        signs_time=number >= (0, 5, 6),
        simulated_tee=number >= (0, 6, 0),
        refuses_taken_ports=number >= (0, 6, 0),
        guards=number >= (0, 6, 0),
    )
