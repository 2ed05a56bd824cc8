"""The Platform API's twin with the laws watching it, and the network between it and one validator."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from tests.simulation.faults import strike
from tests.simulation.laws import Laws
from tests.simulation.plan import NodePlan, Plan
from tests.simulation.virtual import Wall
from tests.simulation.world import Life

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_protocol.platform_messages import Claim, PendingJob, ReleaseReason, SubmissionRef
from platform_validator.platform_client.memory import MemoryPlatform
from platform_validator.platform_client.port import (
    ActiveList,
    HotkeyInUse,
    Notification,
    PlatformError,
    PlatformUnavailable,
)

T = TypeVar("T")
_TIMEOUT = 20.0


class Server(MemoryPlatform):
    """The Platform API."""

    def __init__(self, laws: Laws, plan: Plan) -> None:
        super().__init__(term=timedelta(seconds=120), now=Wall().now)
        self._laws = laws
        self._plan = plan

    def claim(self, job_id: JobId, claim_id: ClaimId, hotkey: str) -> Claim:
        """Noted for the laws."""
        claim = super().claim(job_id, claim_id, hotkey)
        self._laws.grants(hotkey, claim)
        return claim

    def submit(self, job_id: JobId, body: bytes, hotkey: str) -> None:
        """`results`, noted for the laws."""
        job = self.jobs.get(job_id)
        before = job.result if job is not None else None
        self.results(job_id, body)
        if job is not None and job.result is not None and job.result is not before:
            self._laws.accepts(job_id, job.result, hotkey)

    def is_down(self, now: float) -> bool:
        """Whether nobody is answered now."""
        return any(window.holds(now) for window in self._plan.api_down)

    def would_take(self, job_id: JobId, body: bytes, token: str) -> bool:
        """Whether this body has been, or would now be, accepted."""
        job = self.jobs.get(job_id)
        if job is None:
            return False
        if job.result is not None and job.result.lease_token == token:
            return True
        return not job.finished and job.token == token and job.token not in job.released


class Line:
    """The Platform API port of one life of one validator, over a network that loses, delays and repeats.

    Args:
        server: At the other end.
        life: Whose port this is.
        hotkey: Of the validator.
        plan: How bad the network is, everywhere and for this validator.
        laws: Are told.
        dice: Chance.
    """

    def __init__(
        self,
        server: Server,
        life: Life,
        hotkey: str,
        plan: tuple[Plan, NodePlan],
        laws: Laws,
        dice: random.Random,
    ) -> None:
        self._server = server
        self._life = life
        self._hotkey = hotkey
        self._plan, self._mine = plan
        self._laws = laws
        self._dice = dice
        self._seen: int | None = None
        self.healed = False

    async def health(self) -> None:
        """See the port."""
        await self._call("health", lambda: None)

    async def active_challenges(self) -> ActiveList:
        """See the port."""

        def effect() -> ActiveList:
            challenges, self._seen, changed = self._server.active(self._seen)
            return ActiveList(challenges, changed)

        return await self._call("active_challenges", effect)

    async def pending_jobs(
        self, challenge_ids: Sequence[ChallengeId], limit: int = 100
    ) -> Sequence[PendingJob]:
        """See the port."""
        if not challenge_ids:
            return ()
        return await self._call("pending_jobs", lambda: self._server.pending(challenge_ids, limit))

    async def claim(self, job_id: JobId, claim_id: ClaimId) -> Claim:
        """See the port."""
        self._laws.claim_sent(self._life.node, claim_id)
        return await self._call("claim", lambda: self._server.claim(job_id, claim_id, self._hotkey))

    async def renew(self, job_id: JobId, token: LeaseToken) -> timedelta:
        """See the port."""
        term = await self._call("renew", lambda: self._server.renew(job_id, token))
        self._life.grants.add(job_id)
        return term

    async def release(self, job_id: JobId, token: LeaseToken, reason: ReleaseReason) -> None:
        """See the port."""
        await self._call("release", lambda: self._server.release(job_id, token, reason))

    async def send_logs(self, job_id: JobId, token: LeaseToken, seq: int, lines: Sequence[str]) -> None:
        """See the port."""
        del seq
        await self._call("send_logs", lambda: self._server.logs(job_id, token, lines))

    async def submit_result(self, job_id: JobId, body: bytes) -> None:
        """See the port."""
        self._laws.result_sent(self._life.node, body)
        await self._call("submit_result", lambda: self._server.submit(job_id, body, self._hotkey))

    async def fetch_submission(self, submission: SubmissionRef, target: Path) -> None:
        """See the port."""
        job_id = JobId(submission.url.removeprefix("/submissions/").removesuffix("/bundle"))
        data = await self._call("fetch", lambda: self._server.bundle(self._server.jobs[job_id], self._hotkey))
        if hashlib.sha256(data).hexdigest() != submission.sha256:
            raise AssertionError("the twin gave other bytes")
        target.write_bytes(data)

    async def notifications(self) -> AsyncIterator[Notification]:
        """See the port."""
        queue = await self._call("connect", lambda: self._server.connect(self._hotkey, "instance"))
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._dice.expovariate(1 / 300.0)
        held: Notification | None = None
        try:
            while True:
                left = ends_at - loop.time() if not self.healed and not self._plan.calm else None
                try:
                    async with asyncio.timeout(left):
                        item = await queue.get()
                except TimeoutError:
                    self._strike("websocket_broke")
                    raise PlatformUnavailable("the WebSocket broke") from None
                await self._life.pause(self._dice.uniform(0.001, 0.1))
                if item is None or isinstance(item, HotkeyInUse):
                    return
                if isinstance(item, Exception):
                    raise item
                chance = 1.0 if self.healed else self._dice.random()
                if chance < self._plan.hint_faults / 3:
                    self._strike("push_lost")
                    continue
                if chance < self._plan.hint_faults * 2 / 3 and held is None:
                    held = item
                    continue
                yield item
                if chance < self._plan.hint_faults:
                    self._strike("push_repeated")
                    yield item
                if held is not None:
                    self._strike("push_overtaken")
                    earlier, held = held, None
                    yield earlier
        finally:
            self._server.disconnect(queue)

    async def close(self) -> None:
        """Nothing to close."""

    # The network

    async def _call(self, name: str, effect: Callable[[], T]) -> T:
        dice, life, server = self._dice, self._life, self._server
        life.check()
        await life.pause(dice.uniform(0.002, 0.05))
        now = asyncio.get_running_loop().time()
        down = server.is_down(now)
        if down or any(window.holds(now) for window in self._mine.cut_off):
            self._strike("api_down" if down else "cut_off")
            await life.pause(dice.choice((0.01, 1.0, _TIMEOUT)))
            raise PlatformUnavailable(f"{name}: no answer")
        chance = 1.0 if self.healed else dice.random()
        plan = self._plan
        if chance < plan.lost / 2:
            self._strike("request_lost")
            await life.pause(dice.choice((0.01, _TIMEOUT)))
            after = timedelta(seconds=dice.choice((0, 5, 3600))) if dice.random() < 0.3 else None
            if after:
                self._strike("retry_after")
            raise PlatformUnavailable(f"{name}: lost", after)
        if chance < plan.lost / 2 + plan.late:
            # It arrives when nobody waits for the answer any more.
            self._strike("request_late")
            asyncio.get_running_loop().call_later(dice.uniform(1, 90), _done_late, effect)
            await life.pause(_TIMEOUT)
            raise PlatformUnavailable(f"{name}: delayed")
        try:
            answer = effect()
        finally:
            if chance > 1 - plan.repeated and not self.healed:
                self._strike("request_repeated")
                _done_late(effect)
        await life.pause(dice.uniform(0.002, 0.05))
        if plan.lost / 2 + plan.late <= chance < plan.lost + plan.late:
            self._strike("answer_lost")
            await life.pause(dice.choice((0.01, _TIMEOUT)))
            raise PlatformUnavailable(f"{name}: the answer was lost")
        return answer

    def _strike(self, kind: str) -> None:
        strike(self._laws.book, kind)


def _done_late(effect: Callable[[], object]) -> None:
    """A request that arrived once more, or long after: the server answers it, and nobody hears."""
    try:
        effect()
    except PlatformError:
        return
