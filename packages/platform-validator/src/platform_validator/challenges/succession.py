"""Who serves for a challenge, who is to follow, and who leaves: each change in the journal and in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from platform_validator.challenges.chronicle import Chronicle
from platform_validator.challenges.instance import Instance
from platform_validator.challenges.leaving import Leaving
from platform_validator.challenges.lifecycle import Aside, Fact
from platform_validator.challenges.parts import RunnerParts
from platform_validator.challenges.pool import Pool
from platform_validator.crashpoint import crashpoint
from platform_validator.store.records import InstanceRecord, InstanceState


class Succession:
    """At most one serving instance, one candidate, and old ones that finish their jobs.

    Args:
        parts: Shared by all challenges.
        chronicle: Is told.
        pool: The CVMs that stand ready.
    """

    def __init__(self, parts: RunnerParts, chronicle: Chronicle, pool: Pool) -> None:
        self._parts = parts
        self._chronicle = chronicle
        self._pool = pool
        self._serving: Instance | None = None
        self._candidate: Instance | None = None
        self.leaving = Leaving(parts)

    @property
    def serving(self) -> Instance | None:
        """The instance that serves, or has broken and is not brought back yet."""
        return self._serving

    @property
    def candidate(self) -> Instance | None:
        """The instance that is being brought up, or has failed to come up."""
        return self._candidate

    @property
    def active(self) -> Instance | None:
        """The serving instance, while it takes jobs."""
        serving = self._serving
        if serving is None or serving.state is not InstanceState.ACTIVE or serving.drained_for is not None:
            return None
        return serving

    @property
    def over(self) -> bool:
        """Whether no instance is left."""
        return not self.leaving.instances and self._candidate is None and self._serving is None

    def __iter__(self) -> Iterator[Instance]:
        """Every instance: what serves, what is to, and what leaves, the oldest first."""
        ahead = (each for each in (self._serving, self._candidate) if each is not None)
        return iter((*ahead, *self.leaving.instances))

    async def begin(self, candidate: Instance, restores: InstanceRecord | None) -> None:
        """Another instance is to serve; `restores`: it is the one that served when this was journaled.

        Raises:
            StoreUnavailable: It cannot be written.
        """
        self._candidate = candidate
        candidate.restoring = restores is not None
        if restores is not None:
            candidate.record = replace(candidate.record, superseded_by=restores.superseded_by)
            return
        await self._parts.store.put_instance(candidate.record)
        crashpoint("instance_created")
        self._chronicle.said(candidate)
        if self._serving is not None:
            self._serving.record = replace(self._serving.record, superseded_by=candidate.key)
            await self._parts.store.put_instance(self._serving.record)

    async def switch(self, candidate: Instance) -> None:
        """The candidate serves and the old one recycles: one store transaction, then both in memory.

        Raises:
            StoreUnavailable: It cannot be written: nothing has changed.
        """
        now = self._parts.clock.now()
        old = self._serving
        new_before, old_before = candidate.record, old.record if old else None
        candidate.told(Fact.PROVED, at=now)
        if old is not None:
            old.told(Fact.SUPERSEDED, at=now)
        try:
            await self._parts.store.switch_instances(candidate.record, old.record if old else None)
            crashpoint("instance_switched")
        except BaseException:
            candidate.record = new_before
            if old is not None and old_before is not None:
                old.record = old_before
            raise
        self._serving = self._pool.serving = candidate
        self._candidate = None
        candidate.boot_failures, candidate.restoring = 0, False
        if old is not None:
            self._leave(old)
            self._chronicle.said(old)
        self._chronicle.said(candidate)

    async def drain_serving(self, reason: str) -> None:
        """It takes no more jobs, and gives its room to the candidate as those that run end."""
        if (serving := self.active) is not None:
            await self._chronicle.drained_for(serving, reason)
            self._pool.clear(serving)
            crashpoint("instance_draining")

    async def take_jobs_again(self) -> None:
        """The candidate that the serving instance was drained for is no more."""
        if self._serving is not None and self._serving.drained_for is not None:
            await self._chronicle.drained_for(self._serving, None)

    def bring_back(self, broken: Instance) -> None:
        """What served and broke is its own candidate."""
        self._candidate, self._serving = broken, None
        self._pool.serving = None

    async def drop_candidate(self, fact: Fact, *, cut_short: bool) -> None:
        """It is not wanted any more; `cut_short`: while it was being brought up.

        Raises:
            StoreUnavailable: It cannot be written.
        """
        candidate, self._candidate = self._candidate, None
        if candidate is None:
            return
        if cut_short and self._serving is not None:
            # The switch may have been written, and taken back here.
            await self._parts.store.put_instance(self._serving.record)
        now = self._parts.clock.now()
        if candidate.told(fact, at=now) is Aside.FORGOTTEN:
            await self._parts.store.remove_instance(candidate.key, at=now, reason=fact.value)
        else:
            self._leave(candidate)
            await self._parts.store.put_instance(candidate.record)
        self._pool.clear(candidate)
        await self.take_jobs_again()

    async def remove_serving(self) -> None:
        """The challenge has left the list: what serves finishes its jobs, and goes.

        Raises:
            StoreUnavailable: It cannot be written.
        """
        serving, self._serving = self._serving, None
        self._pool.serving = None
        if serving is not None:
            serving.told(Fact.REMOVED, at=self._parts.clock.now())
            self._leave(serving)
            self._chronicle.said(serving)
            await self._parts.store.put_instance(serving.record)
        await self.leaving.retire()

    def _leave(self, instance: Instance) -> None:
        self.leaving.add(instance)
        self._pool.clear(instance)
