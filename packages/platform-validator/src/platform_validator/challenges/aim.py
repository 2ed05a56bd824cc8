"""Which instance of a challenge is to be brought up: what is listed, or what served before. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from platform_protocol.platform_messages import ActiveChallenge
from platform_validator.challenges.instance import generation_of, instance_key
from platform_validator.challenges.settling import followed_at
from platform_validator.store.records import InstanceRecord, InstanceState

_CHANGES = 32


@dataclass(frozen=True, slots=True)
class Target:
    """An instance by its key, and the challenge as it would be for it."""

    wanted: ActiveChallenge
    key: str
    digest: str


class Aim:
    """Follows the list. Times are monotonic seconds.

    Args:
        before: The instance that served when an earlier process ended: it is brought up first, whatever
            the list names by now, so that a new version that fails does not end it (I8).
    """

    def __init__(self, before: InstanceRecord | None = None) -> None:
        self._before = before
        self._listed_first = False
        self._changes: list[float] = []
        self._failures: dict[str, int] = {}
        self.listed: ActiveChallenge | None = None
        self.generation = 0 if before is None else generation_of(before.key)

    def lists(self, listed: ActiveChallenge | None, now: float) -> bool:
        """The list names it so now, or no longer; whether that is new."""
        earlier, self.listed = self.listed, listed
        if listed is None or earlier is None or instance_key(listed) != instance_key(earlier):
            self._changes = [*self._changes[-_CHANGES:], now]
        return listed != earlier

    @property
    def followed_at(self) -> float:
        """When the newest change may be followed."""
        return followed_at(self._changes) if self._changes else 0.0

    def target(self, listed: ActiveChallenge) -> Target:
        """What is to be brought up: what served before, or what is listed; in turns if neither comes up."""
        key, digest = instance_key(listed, self.generation)
        before = self._before
        if before is None or before.key == key or self._listed_first:
            return Target(listed, key, digest)
        earlier = {"github_repo": before.repository, "github_commit": before.commit, "compose_hash": None}
        return Target(listed.model_copy(update=earlier), before.key, before.spec_digest)

    def record(self, target: Target, at: datetime) -> InstanceRecord:
        """The instance as it begins."""
        return InstanceRecord(
            key=target.key,
            challenge_id=target.wanted.id,
            name=target.wanted.name,
            repository=target.wanted.github_repo,
            commit=target.wanted.github_commit,
            spec_digest=target.digest,
            state=InstanceState.CREATED,
            since=at,
            failures=self.failures(target.key),
        )

    def restores(self, key: str) -> InstanceRecord | None:
        """What served before, if that is its key."""
        return self._before if self._before is not None and self._before.key == key else None

    def failures(self, key: str) -> int:
        """How often an instance has failed since something served."""
        return self._failures.get(key, 0)

    def failed(self, record: InstanceRecord) -> None:
        """A candidate has: the other one's turn comes."""
        self._failures[record.key] = record.failures
        self._listed_first = not self._listed_first

    def broke(self, record: InstanceRecord) -> None:
        """What served has: it is brought back before anything newer."""
        self._before, self._listed_first = record, False

    def served(self) -> None:
        """A candidate serves: what was before is of no interest any more."""
        self._before, self._listed_first = None, False
        self._failures.clear()

    def surroundings(self, generation: int, *, differ: bool) -> bool:
        """Whether what the list does not name differs from what an instance of a generation was made of.

        Returns:
            Whether another generation begins.
        """
        begins = differ and self.generation == generation
        self.generation = self.generation + 1 if begins else self.generation if differ else generation
        return begins
