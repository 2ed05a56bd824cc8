"""One validator's disk: the store's twin, which outlives each life, and the way of one life to it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

from tests.simulation.faults import strike
from tests.simulation.laws import Laws
from tests.simulation.plan import NodePlan
from tests.simulation.server import Server
from tests.simulation.world import Life

from platform_protocol.ids import ClaimId, JobId
from platform_protocol.platform_messages import ResultBody
from platform_validator.store.memory import MemoryStore
from platform_validator.store.port import Store, StoreUnavailable

_SLOW = 0.1
"""How often a call takes a while; all others give others a turn, as a call of the real store does."""
_READS = frozenset(
    {
        "identity",
        "job",
        "open_jobs",
        "recent_jobs",
        "outbox",
        "vm",
        "open_vms",
        "drained_hosts",
        "challenge_history",
        "instances",
        "values",
        "value",
        "close",
    }
)


class Disk:
    """The Store port of one life. Every method of it goes through `_through`.

    Args:
        store: What is on the disk.
        life: Whose port this is.
        plan: When the disk is full.
        chance: Of a write that fails.
        laws: Are told of every write.
        server: Asked whether a result may leave the outbox.
        dice: Chance.
    """

    def __init__(
        self,
        store: MemoryStore,
        life: Life,
        plan: NodePlan,
        chance: float,
        laws: Laws,
        server: Server,
        dice: random.Random,
    ) -> None:
        self._store = store
        self._life = life
        self._plan = plan
        self._chance = chance
        self._laws = laws
        self._server = server
        self._dice = dice
        self.healed = False

    def port(self) -> Store:
        """This, as the port that it answers."""
        return cast("Store", self)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._store, name)
        writes = name not in _READS

        async def call(*arguments: Any, **named: Any) -> Any:
            await self._through(name, writes=writes)
            if writes:
                self._before(name, arguments)
            answer = await method(*arguments, **named)
            if writes:
                self._after(name, arguments)
            return answer

        setattr(self, name, call)
        return call

    async def _through(self, name: str, *, writes: bool) -> None:
        life, dice = self._life, self._dice
        life.check()
        if dice.random() < _SLOW or life.frozen_until:
            await life.pause(dice.uniform(0.0, 0.02))
        else:
            await asyncio.sleep(0)
            life.check()
        if not writes or self.healed:
            return
        now = asyncio.get_running_loop().time()
        full = any(window.holds(now) for window in self._plan.full_disk)
        if full or dice.random() < self._chance:
            strike(self._laws.book, "disk_full" if full else "disk_error")
            raise StoreUnavailable(f"{name}: no space left on device")

    def _before(self, name: str, arguments: tuple[Any, ...]) -> None:
        node, laws = self._life.node, self._laws
        claim_id = cast("ClaimId", arguments[0]) if arguments else ClaimId("")
        match name:
            case "outbox_delivered":
                laws.result_left(node, claim_id, justified=self._accepted(claim_id), why="delivered")
            case "outbox_refused":
                laws.result_left(node, claim_id, justified=self._refused(claim_id), why=arguments[1])
            case "end_job":
                laws.job_ended(node, claim_id)

    def _after(self, name: str, arguments: tuple[Any, ...]) -> None:
        node, laws = self._life.node, self._laws
        match name:
            case "open_claim":
                laws.journaled_claim(node, arguments[0].claim_id, arguments[0].job_id)
            case "intend_vm":
                laws.intended(node, arguments[0].name)
            case "store_result":
                laws.result_stored(node, arguments[0], arguments[2])

    def _job_of(self, claim_id: ClaimId) -> JobId:
        return self._laws.claims[self._life.node][claim_id]

    def _accepted(self, claim_id: ClaimId) -> bool:
        body = self._laws.waiting.get(self._life.node, {}).get(claim_id)
        if body is None:
            return True
        job = self._server.jobs[self._job_of(claim_id)]
        token = ResultBody.model_validate_json(body).lease_token
        return job.result is not None and job.result.lease_token == token

    def _refused(self, claim_id: ClaimId) -> bool:
        body = self._laws.waiting.get(self._life.node, {}).get(claim_id)
        if body is None:
            return True
        token = ResultBody.model_validate_json(body).lease_token
        return not self._server.would_take(self._job_of(claim_id), body, token)
