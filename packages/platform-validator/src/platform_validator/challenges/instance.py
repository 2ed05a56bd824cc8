"""One instance of a challenge while the daemon lives: its record, plan, CVMs and users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Protocol

from platform_protocol.canonical import canonical_json, sha256_hex
from platform_protocol.ids import ChallengeId
from platform_protocol.platform_messages import ActiveChallenge
from platform_protocol.resources import Resources
from platform_protocol.spec import ChallengeSpec
from platform_validator.challenges.kit import instance_part, pack
from platform_validator.challenges.lifecycle import Aside, Fact, transition
from platform_validator.challenges.room import Guest
from platform_validator.challenges.source import FetchedTree
from platform_validator.cvm.plan import CvmPlan
from platform_validator.store.records import InstanceRecord, InstanceState

_COLONS_WITH_GENERATION = 3


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance as status, CLI and pages show it."""

    key: str
    challenge_id: ChallengeId
    name: str
    repository: str
    commit: str
    state: InstanceState
    since: datetime
    reason: str | None
    compose_hash: str | None
    superseded_by: str | None
    failures: int
    ready: int
    jobs: int
    mode: str | None = None


@dataclass(frozen=True, slots=True)
class ChallengeView:
    """A challenge: the state of its serving instance and, beside it, of its candidate and of old ones."""

    id: ChallengeId
    name: str
    state: InstanceState
    serving: InstanceView | None
    candidate: InstanceView | None
    old: tuple[InstanceView, ...]


def instance_key(wanted: ActiveChallenge, generation: int = 0) -> tuple[str, str]:
    """The key of an instance and the digest of its specification, as the API lists it.

    `generation` tells instances apart that differ in what the API does not list: image, environment, limits.
    """
    digest = _digest(wanted.github_repo, wanted.compose_hash, wanted.resources)
    again = f":{generation}" if generation else ""
    return f"{wanted.id}:{wanted.github_commit[:64]}:{digest[:16]}{again}", digest


@lru_cache(maxsize=1024)
def _digest(repository: str, compose_hash: str | None, resources: Resources) -> str:
    """Asked for at every step of every challenge, and rarely another."""
    specification = {
        "github_repo": repository,
        "compose_hash": compose_hash,
        "resources": resources.model_dump(mode="json"),
    }
    return sha256_hex(canonical_json(specification))


def generation_of(key: str) -> int:
    """The generation in an instance's key."""
    last = key.rpartition(":")[2]
    return int(last) if key.count(":") == _COLONS_WITH_GENERATION and last.isdigit() else 0


@dataclass(slots=True, eq=False)
class Resident:
    """The one CVM of a `shared` instance: jobs take seats in it. Retired, it goes with its last job."""

    cvm: Guest
    since: float
    idle_since: float
    seats: int = 0
    retired: bool = False


class Instance:
    """An instance. Decisions about it are `lifecycle.transition`'s; this holds what they are about.

    Args:
        record: As stored.
        wanted: The challenge as the API lists it.
    """

    def __init__(self, record: InstanceRecord, wanted: ActiveChallenge) -> None:
        self.record = record
        self.wanted = wanted
        self.plan: CvmPlan | None = None
        self.spec: ChallengeSpec | None = None
        self.ready: list[tuple[float, Guest]] = []
        self.resident: Resident | None = None
        self.generation = 0
        self.restoring = False
        self.users = 0
        self.boot_failures = 0
        self.lasting = False
        self.refused_under: str | None = None
        self.tree: FetchedTree | None = None
        self.compose_file: str | None = None
        self.waits: str | None = None
        self.drained_for: str | None = None
        self.leaving: list[Resident] = []
        self.leaves_at = 0.0
        self._kit: str | None = None

    def __repr__(self) -> str:
        return (
            f"<Instance {self.record.challenge_id} {self.record.commit[:10]} {self.state.value} "
            f"ready={len(self.ready)} jobs={self.users}>"
        )

    @property
    def key(self) -> str:
        """Its key in the store."""
        return self.record.key

    @property
    def state(self) -> InstanceState:
        """Its state."""
        return self.record.state

    @property
    def shared(self) -> bool:
        """Whether one CVM runs its jobs."""
        return self.spec is not None and self.spec.execution.cvm == "shared"

    @property
    def free_seat(self) -> Resident | None:
        """The CVM of a shared instance, while it takes one more job."""
        resident, spec = self.resident, self.spec
        if resident is None or spec is None or resident.seats >= spec.execution.concurrency:
            return None
        return resident

    @property
    def holds_cvms(self) -> bool:
        """Whether draining it would make room."""
        return bool(self.users or self.ready or self.resident)

    def kit(self, plan: CvmPlan, spec: ChallengeSpec) -> str:
        """The instance's part of its jobs' kits; made once."""
        if self._kit is None:
            self._kit = instance_part(plan, spec)
        return self._kit

    def told(self, fact: Fact, *, at: datetime, reason: str | None = None) -> InstanceState | Aside:
        """Apply a fact to the record (not yet stored); returns what the lifecycle said."""
        verdict = transition(self.record.state, fact)
        if isinstance(verdict, InstanceState):
            failed = verdict is InstanceState.FAILED
            self.record = replace(
                self.record,
                state=verdict,
                since=at,
                reason=reason if failed else None,
                failures=self.record.failures + 1 if failed else self._failures_after(verdict),
            )
        return verdict

    def _failures_after(self, state: InstanceState) -> int:
        return 0 if state is InstanceState.ACTIVE else self.record.failures

    def view(self) -> InstanceView:
        """As shown."""
        record = self.record
        return InstanceView(
            key=record.key,
            challenge_id=record.challenge_id,
            name=record.name,
            repository=record.repository,
            commit=record.commit,
            state=record.state,
            since=record.since,
            reason=record.reason or self.waits,
            compose_hash=record.compose_hash,
            superseded_by=record.superseded_by,
            failures=record.failures,
            ready=len(self.ready) if self.resident is None else 1,
            jobs=self.users,
            mode=self.spec.execution.cvm if self.spec else None,
        )


class Landlord(Protocol):
    """Keeps the CVMs that references take and give back."""

    def changed(self) -> None:
        """Somebody took or gave back."""

    def claimed(self) -> None:
        """A job was claimed."""

    def vacated(self, resident: Resident) -> None:
        """A retired CVM has lost its last job."""

    def condemn(self, instance: Instance, resident: Resident, reason: str) -> None:
        """The CVM of a shared instance did not serve a job to its end: no other job is given to it."""


class InstanceRef:
    """A job's counted reference: the instance, its plan and its bundle stay until `release`."""

    def __init__(
        self,
        instance: Instance,
        plan: CvmPlan,
        spec: ChallengeSpec,
        landlord: Landlord,
        clock: Callable[[], float],
    ) -> None:
        self._instance = instance
        self._landlord = landlord
        self._clock = clock
        self._released = False
        self._seat: Resident | None = None
        self.plan = plan
        self.spec = spec
        instance.users += 1

    @property
    def key(self) -> str:
        """The instance's key, journaled with the claim."""
        return self._instance.key

    @property
    def commit(self) -> str:
        """The commit that a job of this reference runs."""
        return self._instance.record.commit

    def kit(self, running_since: float) -> bytes:
        """What a later process needs to finish a job that runs since then."""
        return pack(running_since, self._instance.kit(self.plan, self.spec))

    @property
    def listed(self) -> Resources:
        """What the API lists the challenge with: what its jobs ask for unless they say otherwise."""
        return self._instance.wanted.resources

    @property
    def shared(self) -> bool:
        """Whether its job runs beside others in one CVM, which outlives it."""
        return self.spec.execution.cvm == "shared"

    def ready_size(self) -> Resources | None:
        """The size of the CVM that `take_ready` would give, or None."""
        if self.shared:
            resident = self._instance.free_seat
            return None if resident is None else resident.cvm.plan.resources
        return self._instance.ready[0][1].plan.resources if self._instance.ready else None

    def take_ready(self) -> Guest | None:
        """Take an idle ready CVM, the oldest first: it belongs to the caller; or a seat in the shared one."""
        if self.shared:
            self._seat = resident = self._instance.free_seat
            if resident is None:
                return None
            resident.seats += 1
            return resident.cvm
        if not self._instance.ready:
            return None
        _, cvm = self._instance.ready.pop(0)
        self._landlord.changed()
        return cvm

    def give_back(self, cvm: Guest) -> None:
        """Give back a ready CVM that nothing was sent to. A seat is given up by `release`."""
        if not self.shared:
            self._instance.ready.insert(0, (self._clock(), cvm))
            self._landlord.changed()

    def claimed(self) -> None:
        """Its job was granted."""
        self._landlord.claimed()

    def condemn(self, reason: str) -> None:
        """The shared CVM did not serve the job to its end."""
        if self._seat is not None:
            self._landlord.condemn(self._instance, self._seat, reason)

    def release(self) -> None:
        """Let go, once; more calls change nothing."""
        if self._released:
            return
        self._released = True
        self._instance.users -= 1
        seat, self._seat = self._seat, None
        if seat is not None:
            seat.seats -= 1
            seat.idle_since = self._clock()
            if seat.retired and seat.seats == 0:
                self._landlord.vacated(seat)
        self._landlord.changed()
