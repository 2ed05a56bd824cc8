"""The one arbiter of a VMM's host ports and GPU slots: dstack gives either to two VMs without a word.

What is taken is read from the VMM's own list, so that a restart forgets nothing and VMs of others count.
Beside it stands what was asked for and is not in the list yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from platform_protocol.ids import VmName
from platform_validator.cvm.dstack.answers import number, objects
from platform_validator.cvm.vmm import VmmAtCapacity, VmmRefused, VmSpec

LATE = 900.0
"""Seconds for which a VM whose creation was not answered may still come up."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a VM holds. `everything`: it has all GPUs of the host attached."""

    name: VmName
    ports: frozenset[int] = frozenset()
    slots: frozenset[str] = frozenset()
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the host. `free`: no VM uses it at this moment."""

    slot: str
    free: bool


def read_claim(info: Mapping[str, Any]) -> Claim:
    """What a VmInfo says that it holds, whatever its state: it can be started again."""
    configuration = info.get("configuration")
    fields = configuration if isinstance(configuration, dict) else {}
    gpus = fields.get("gpus")
    attached = gpus if isinstance(gpus, dict) else {}
    return Claim(
        VmName(str(info.get("name", ""))),
        frozenset(number(one.get("host_port")) for one in objects(fields.get("ports"))) - {0},
        frozenset(str(one.get("slot")) for one in objects(attached.get("gpus"))),
        attached.get("attach_mode") == "all",
    )


def choose(spec: VmSpec, held: Iterable[Claim], gpus: Sequence[Gpu]) -> Claim:
    """What the VM gets: its port, and the first GPU slots that nobody has.

    Raises:
        VmmRefused: Another VM has the host port.
        VmmAtCapacity: There are not as many GPUs.
    """
    others = [claim for claim in held if claim.name != spec.name]
    # 1. The host port, if it is nobody's.
    if any(spec.host_port in claim.ports for claim in others):
        raise VmmRefused(f"host port {spec.host_port} is in use by another VM of this VMM")
    wanted = max(spec.resources.gpu_count, len(spec.gpus))
    if not wanted:
        return Claim(spec.name, frozenset({spec.host_port}))
    # 2. GPUs: those that were named, else any.
    taken = frozenset().union(*(claim.slots for claim in others))
    free = [gpu.slot for gpu in gpus if gpu.free and gpu.slot not in taken]
    if any(claim.everything for claim in others):
        free = []
    chosen = list(spec.gpus) or free[:wanted]
    if len(chosen) < wanted or not set(chosen) <= set(free):
        raise VmmAtCapacity(
            f"gpu: {', '.join(spec.gpus) or wanted} wanted, {len(free)} of the VMM's {len(gpus)} free"
        )
    return Claim(spec.name, frozenset({spec.host_port}), frozenset(chosen))


class Arbiter:
    """Holds what was asked for and does not show yet.

    Args:
        monotonic: Seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._asked: dict[VmName, tuple[Claim, float]] = {}
        self._answered: set[VmName] = set()
        self.turn = asyncio.Lock()
        """Guards the time between a look at the VMM's list and `hold`: one create at a time."""

    def answered(self) -> frozenset[VmName]:
        """Whose creation was answered before now: a list that is asked for now shows what became of them."""
        return frozenset(self._answered)

    def hold(
        self, spec: VmSpec, shown: Sequence[Claim], gpus: Sequence[Gpu], *, answered: frozenset[VmName]
    ) -> Claim:
        """Choose, and hold it until the VMM's list tells, or until it comes too late.

        Args:
            spec: What is wanted.
            shown: The VMM's list.
            gpus: Its GPUs.
            answered: What `answered` was before the list was asked for.

        Raises:
            VmmRefused, VmmAtCapacity: As `choose`.
        """
        now, told = self._monotonic(), {claim.name for claim in shown} | answered
        self._asked = {
            name: asked for name, asked in self._asked.items() if name not in told and asked[1] > now
        }
        self._answered &= self._asked.keys()
        claim = choose(spec, [*shown, *(asked for asked, _ in self._asked.values())], gpus)
        self._asked[spec.name] = claim, now + LATE
        return claim

    def settle(self, name: VmName) -> None:
        """Its creation was answered: the next list shows it, or it never will be."""
        if name in self._asked:
            self._answered.add(name)
