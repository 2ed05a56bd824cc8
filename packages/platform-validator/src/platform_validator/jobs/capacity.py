"""May this job be claimed now? A pure decision over facts: the usage guide's three checks, in its order."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.resources import Resources
from platform_validator.cvm.quota import Refusal


class NoCapacity(StrEnum):
    """Why a job is not claimed now, in the order in which it is looked for."""

    STOPPED = "not_claiming"
    HELD = "job_in_journal"
    NOT_ACTIVE = "challenge_not_active"
    NO_ATTESTATION = "attestation_impossible"
    GATE = "claim_gate_closed"
    HOST = "no_host_open"
    IMAGE = "no_host_has_the_image"
    CPU = "cpu"
    MEMORY = "memory"
    DISK = "disk"
    GPU = "gpu"
    SHARED = "shared_cvm"
    JOBS = "active_jobs"
    CVMS = "cvm_quota"


@dataclass(frozen=True, slots=True)
class Need:
    """What a job asks for."""

    job_id: JobId
    challenge_id: ChallengeId
    resources: Resources


@dataclass(frozen=True, slots=True)
class CapacityFacts:
    """What the decision looks at.

    `room` is why the quota has none for another CVM of this size, or None; `ready` the size of an idle CVM
    of this challenge, whose resources are reserved already; `shared`: the job runs in that CVM and in no
    other (one that is too large for it has its own).
    """

    claiming: bool
    held: frozenset[JobId]
    active: frozenset[ChallengeId]
    can_attest: bool
    gate_open: bool
    room: Refusal | None
    ready: Resources | None
    active_jobs: int
    max_jobs: int
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Capacity:
    """The answer. `refusal` is None when the job may be claimed; `uses_ready` then says from where.

    `detail` has the figures of a refusal that has any: what is wanted, what is free.
    """

    refusal: NoCapacity | None
    uses_ready: bool = False
    detail: str = ""

    def __bool__(self) -> bool:
        return self.refusal is None

    @property
    def lacks_room(self) -> bool:
        """Idle ready CVMs could make room for it by yielding."""
        return self.refusal in _ROOM


_REASONS = {
    "host": NoCapacity.HOST,
    "image": NoCapacity.IMAGE,
    "cpu": NoCapacity.CPU,
    "memory": NoCapacity.MEMORY,
    "disk": NoCapacity.DISK,
    "gpu": NoCapacity.GPU,
}
_ROOM = frozenset({NoCapacity.CPU, NoCapacity.MEMORY, NoCapacity.DISK, NoCapacity.GPU, NoCapacity.CVMS})


def covers(have: Resources, need: Resources) -> bool:
    """Whether a CVM of size `have` is large enough for `need`."""
    return (
        have.cpu_cores >= need.cpu_cores
        and have.memory_mb >= need.memory_mb
        and have.disk_mb >= need.disk_mb
        and have.gpu_count >= need.gpu_count
    )


def largest(first: Resources, second: Resources) -> Resources:
    """The smallest size that covers both."""
    if covers(first, second):
        return first
    return Resources(
        cpu_cores=max(first.cpu_cores, second.cpu_cores),
        memory_mb=max(first.memory_mb, second.memory_mb),
        disk_mb=max(first.disk_mb, second.disk_mb),
        gpu_count=max(first.gpu_count, second.gpu_count),
    )


def has_capacity(need: Need, facts: CapacityFacts) -> Capacity:
    """Decide whether a job may be claimed; the first check that fails gives the reason."""
    # Before the guide's checks: whether this validator may claim this job at all.
    admission = _admission(need, facts)
    if admission is not None:
        return Capacity(admission)
    uses_ready = facts.ready is not None and covers(facts.ready, need.resources)
    if facts.shared and not uses_ready:
        return Capacity(NoCapacity.SHARED, detail="every seat in it is taken, or it is not up")
    # 1. Resource availability, on a host that is open; a ready CVM has its share reserved already.
    room = None if uses_ready else facts.room
    if room is not None and room.reason != "cvms":
        return Capacity(_REASONS[room.reason], detail=room.figures)
    # 2. Active job limit.
    if facts.active_jobs >= facts.max_jobs:
        return Capacity(NoCapacity.JOBS, detail=f"{facts.active_jobs} of {facts.max_jobs} run")
    # 3. CVM quota.
    if room is not None:
        return Capacity(NoCapacity.CVMS, detail=room.figures)
    return Capacity(None, uses_ready)


def _admission(need: Need, facts: CapacityFacts) -> NoCapacity | None:
    if not facts.claiming:
        return NoCapacity.STOPPED
    if need.job_id in facts.held:
        return NoCapacity.HELD
    if need.challenge_id not in facts.active:
        return NoCapacity.NOT_ACTIVE
    if not facts.can_attest:
        return NoCapacity.NO_ATTESTATION
    if not facts.gate_open:
        return NoCapacity.GATE
    return None
