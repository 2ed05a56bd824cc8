"""The instances of one challenge that serve no more: they finish their jobs, and go."""

from __future__ import annotations

from datetime import timedelta

import structlog

from platform_validator.challenges.instance import Instance
from platform_validator.challenges.lifecycle import DEADLINES, Fact
from platform_validator.challenges.parts import RunnerParts
from platform_validator.crashpoint import crashpoint
from platform_validator.store.records import InstanceState

_log = structlog.get_logger(__name__)


class Leaving:
    """Recycling instances, the oldest first."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self.instances: list[Instance] = []

    def add(self, instance: Instance) -> None:
        """It finishes its jobs, as long as the longest of them may take."""
        longest = instance.plan.timeout if instance.plan is not None else timedelta(0)
        patience = longest + (DEADLINES[InstanceState.RECYCLING] or timedelta(0))
        instance.leaves_at = self._parts.clock.monotonic() + patience.total_seconds()
        instance.drained_for = None
        self.instances.append(instance)

    async def retire(self) -> None:
        """Forget those whose last job has ended, or whose time is over; then a shared CVM goes too.

        Raises:
            StoreUnavailable: It cannot be written.
        """
        now = self._parts.clock.monotonic()
        for instance in [each for each in self.instances if each.users == 0 or now >= each.leaves_at]:
            instance.told(Fact.DRAINED, at=self._parts.clock.now())
            crashpoint("instance_recycled")
            await self._parts.store.remove_instance(instance.key, at=self._parts.clock.now())
            self.instances.remove(instance)
            for resident in instance.leaving:
                self._parts.fleet.destroy(resident.cvm.name)
            record = instance.record
            _log.info("instance_gone", challenge_id=record.challenge_id, commit=record.commit)
