"""What to do about each VM that the VMM shows and each that the journal holds. Pure.

Ours is what the journal has by its exact name, and nothing else: a VM with our state id that the journal
does not know (a restored backup) is reported and left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from platform_protocol.ids import VmName
from platform_validator.cvm.vmm import Vm
from platform_validator.store.records import VmPhase, VmRecord


@dataclass(frozen=True, slots=True)
class Reclaim:
    """`destroy`: ours, and nobody holds them. `strays`: with our state id, and not in our journal."""

    destroy: tuple[VmName, ...]
    strays: tuple[VmName, ...]


def plan_reclaim(
    records: Sequence[VmRecord],
    seen: Mapping[VmName, Vm],
    held: Collection[VmName],
    *,
    ended: Collection[VmName] = (),
    state_id: str,
    now: datetime,
) -> Reclaim:
    """Compare journal and VMM.

    Args:
        records: The journal's CVMs that are not gone.
        seen: What the VMM shows, by name.
        held: CVMs that a boot, a job or the ready pool holds now, and those on their way out.
        ended: Names among `seen` that the journal holds as gone.
        state_id: In the names of ours.
        now: For hard deadlines.
    """
    destroy: list[VmName] = []
    for record in records:
        # 1. On its way already.
        if record.phase in (VmPhase.DESTROYING, VmPhase.GONE):
            continue
        # 2. Nobody holds it: left by a crash, or by a create that was answered late.
        # 3. Held past its hard deadline.
        if record.name not in held or now >= record.hard_deadline:
            destroy.append(record.name)
    # 4. Gone by the journal, and there: its creation was answered late, after we had looked for it.
    destroy.extend(sorted(name for name in ended if name in seen and name not in held))
    known = {record.name for record in records} | set(ended) | set(held)
    ours = f"pv-{state_id}-"
    strays = sorted(name for name in seen if name.startswith(ours) and name not in known)
    return Reclaim(tuple(destroy), tuple(strays))
