"""A CVM that an earlier process left running: adopted once, for all jobs that go on in it."""

from __future__ import annotations

import asyncio

from platform_protocol.ids import VmName
from platform_validator.challenges.room import CvmFleet, Guest
from platform_validator.cvm.plan import CvmPlan


class LeftCvm:
    """Held by each job that ran in it; destroyed when the last one lets go.

    Args:
        name: Which.
        fleet: Adopts and destroys.
    """

    def __init__(self, name: VmName, fleet: CvmFleet) -> None:
        self.name = name
        self._fleet = fleet
        self._jobs = 0
        self._guest: Guest | None = None
        self._adopting = asyncio.Lock()
        """While it is adopted: the others then share what the first one got."""

    def hold(self) -> None:
        """One more job goes on in it; all of them hold it before the first may let go."""
        self._jobs += 1

    async def adopt(self, plan: CvmPlan) -> Guest:
        """Take it over, or share what another job took over.

        Raises:
            CvmError: What `CvmFleet.adopt` raises; a second try then finds it gone.
        """
        async with self._adopting:
            if self._guest is None:
                self._guest = await self._fleet.adopt(self.name, plan)
            return self._guest

    def let_go(self) -> None:
        """A job needs it no more."""
        self._jobs -= 1
        if self._jobs == 0:
            self._fleet.destroy(self.name)
