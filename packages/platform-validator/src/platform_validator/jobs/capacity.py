"""May this job be claimed now? A pure decision over facts: the usage guide's three checks, in its order."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.resources import Resources


class NoCapacity(StrEnum):
    """Why a job is not claimed now."""

    STOPPED = "not_claiming"
    HELD = "job_in_journal"
    NOT_ACTIVE = "challenge_not_active"
    NO_ATTESTATION = "attestation_impossible"
    GATE = "claim_gate_closed"
    CPU = "cpu"
    MEMORY = "memory"
    DISK = "disk"
    GPU = "gpu"
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

    `free` is what the limits leave after all reservations; `ready` the size of an idle CVM of this
    challenge, whose resources are reserved already; `cvms` counts reservations against `max_cvms`.
    """

    claiming: bool
    held: frozenset[JobId]
    active: frozenset[ChallengeId]
    can_attest: bool
    gate_open: bool
    free: Resources
    ready: Resources | None
    active_jobs: int
    max_jobs: int
    cvms: int
    max_cvms: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """The answer. `refusal` is None when the job may be claimed; `uses_ready` then says from where."""

    refusal: NoCapacity | None
    uses_ready: bool = False

    def __bool__(self) -> bool:
        return self.refusal is None

    @property
    def lacks_room(self) -> bool:
        """Idle ready CVMs could make room for it by yielding."""
        return self.refusal in _ROOM


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
    # 1. Resource availability; a ready CVM has its share reserved already.
    lacking = None if uses_ready else _lacking(need.resources, facts.free)
    if lacking is not None:
        return Capacity(lacking)
    # 2. Active job limit.
    if facts.active_jobs >= facts.max_jobs:
        return Capacity(NoCapacity.JOBS)
    # 3. CVM quota.
    if not uses_ready and facts.cvms >= facts.max_cvms:
        return Capacity(NoCapacity.CVMS)
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


def _lacking(need: Resources, free: Resources) -> NoCapacity | None:
    checks = (
        (NoCapacity.CPU, need.cpu_cores, free.cpu_cores),
        (NoCapacity.MEMORY, need.memory_mb, free.memory_mb),
        (NoCapacity.DISK, need.disk_mb, free.disk_mb),
        (NoCapacity.GPU, need.gpu_count, free.gpu_count),
    )
    return next((reason for reason, wanted, left in checks if wanted > left), None)
