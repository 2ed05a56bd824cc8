"""One instance of a challenge while the daemon lives: its record, plan, idle ready CVMs and users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from platform_protocol.canonical import canonical_json, sha256_hex
from platform_protocol.ids import ChallengeId
from platform_protocol.platform_messages import ActiveChallenge
from platform_protocol.resources import Resources
from platform_protocol.spec import ChallengeSpec
from platform_validator.challenges.kit import instance_part, pack
from platform_validator.challenges.lifecycle import Aside, Fact, transition
from platform_validator.challenges.room import Guest
from platform_validator.cvm.plan import CvmPlan
from platform_validator.store.records import InstanceRecord, InstanceState


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


@dataclass(frozen=True, slots=True)
class ChallengeView:
    """A challenge: the state of its serving instance and, beside it, of its candidate and of old ones."""

    id: ChallengeId
    name: str
    state: InstanceState
    serving: InstanceView | None
    candidate: InstanceView | None
    old: tuple[InstanceView, ...]


def instance_key(wanted: ActiveChallenge) -> tuple[str, str]:
    """The key of an instance and the digest of its specification, as the API lists it."""
    specification = {
        "github_repo": wanted.github_repo,
        "compose_hash": wanted.compose_hash,
        "resources": wanted.resources.model_dump(mode="json"),
    }
    digest = sha256_hex(canonical_json(specification))
    return f"{wanted.id}:{wanted.github_commit[:64]}:{digest[:16]}", digest


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
        self.users = 0
        self.boot_failures = 0
        self.lasting = False
        self.refused_under: str | None = None
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
            reason=record.reason,
            compose_hash=record.compose_hash,
            superseded_by=record.superseded_by,
            failures=record.failures,
            ready=len(self.ready),
            jobs=self.users,
        )


class InstanceRef:
    """A job's counted reference: the instance, its plan and its bundle stay until `release`."""

    def __init__(
        self,
        instance: Instance,
        plan: CvmPlan,
        spec: ChallengeSpec,
        changed: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._instance = instance
        self._changed = changed
        self._clock = clock
        self._released = False
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

    def ready_size(self) -> Resources | None:
        """The size of the idle ready CVM that `take_ready` would give, or None."""
        return self._instance.ready[0][1].plan.resources if self._instance.ready else None

    def take_ready(self) -> Guest | None:
        """Take an idle ready CVM, the oldest first: it belongs to the caller from now on."""
        if not self._instance.ready:
            return None
        _, cvm = self._instance.ready.pop(0)
        self._changed()
        return cvm

    def give_back(self, cvm: Guest) -> None:
        """Give back a ready CVM that nothing was sent to."""
        self._instance.ready.insert(0, (self._clock(), cvm))
        self._changed()

    def release(self) -> None:
        """Let go, once; more calls change nothing."""
        if not self._released:
            self._released = True
            self._instance.users -= 1
            self._changed()
