"""The session port over a guest in memory: attested, configured, given its job, resumed by a later life."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.simulation.guests import Given, Guest
from tests.simulation.host import Host
from tests.simulation.world import Life

from platform_protocol.ids import ChallengeId, JobId, VmName
from platform_protocol.session.messages import JobError
from platform_protocol.session.v2 import Offer
from platform_validator.cvm.connection import Callee, Judge, SessionPace
from platform_validator.cvm.errors import SessionLost
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.memory import Machine
from platform_validator.cvm.session import ValuesHandler


class SimulatedSession:
    """See `platform_validator.cvm.sessions.Session`."""

    def __init__(self, host: Host, life: Life, callee: Callee, judge: Judge, *, resume: bool) -> None:
        self._host = host
        self._life = life
        self._callee = callee
        self._judge = judge
        self._resume = resume
        self._closed = asyncio.Event()
        self._guest: Guest | None = None

    async def run(self) -> None:
        """See the port."""
        await self._closed.wait()

    async def ready(self) -> None:
        """See the port."""
        name, dice = self._callee.vm, self._host.dice
        await self._life.pause(dice.uniform(0.05, 1.0))
        _, guest = await self._reach()
        await self._judge(Offer(2, None, "", "", b"", VmName(name)))
        self._life.check()
        if guest.gone.is_set():
            raise SessionLost(f"{name} died in the handshake")
        if self._resume and (guest.session_id != self._callee.session_id or not guest.configured):
            raise SessionLost(f"{name} rebooted: it does not know the session")
        guest.session_id, guest.configured = self._callee.session_id, True
        self._guest = guest

    async def execute(
        self,
        order: JobOrder,
        submission: Path | None,
        *,
        on_started: Callable[[bool], None],
        on_progress: Callable[[float, str], None],
        on_log: Callable[[str, str], None],
    ) -> GuestResult:
        """See the port."""
        del submission
        host, life = self._host, self._life
        await life.pause(host.dice.uniform(0.01, 0.2))
        machine, guest = await self._reach()
        if guest is not self._guest:
            raise SessionLost(f"{self._callee.vm} rebooted")
        if self._resume:
            host.laws.adopts(life, order.job_id)
        given = guest.given.get(order.job_id)
        already = given is not None and given.attempt == order.attempt
        if not already:
            host.laws.runs(life, _hotkey(life), order.job_id, order.attempt)
            if not guest.may_begin():
                host.laws.book.violated("I5", f"{self._callee.vm} was given a job that it may not run")
            host.guests.begin(machine, guest, order.job_id, order.attempt)
        given = guest.given[order.job_id]
        on_started(already)
        on_progress(1.0, "running")
        on_log("info", "running")
        await self._until_over(guest, given)
        life.check()
        script = given.script
        if not given.done.is_set():
            await life.pause(host.dice.uniform(0, 60))
            raise SessionLost(f"{self._callee.vm} cannot be reached any more")
        failed = script.does == "error"
        return GuestResult(
            job_id=order.job_id,
            attempt=order.attempt,
            result=None if failed else {"score": script.score},
            error=JobError(code="submission_failed", message="by its script") if failed else None,
            evidence=None,
            execution_time_ms=int(script.lasts * 1000),
            seq=1,
        )

    async def cancel(self, job_id: JobId, reason: str) -> None:
        """See the port. What is sent arrives, also when its sender is stopped before it knows."""
        del reason
        self._life.check()
        given = None if self._guest is None else self._guest.given.get(job_id)
        if given is not None:
            given.cancelled = True
        await self._life.pause(0.01)

    async def confirm(self) -> None:
        """See the port."""
        await self._life.pause(0.05)
        found = self._host.guests.running(self._callee.vm)
        if found is None or found[1] is not self._guest:
            await self._life.pause(self._host.dice.uniform(0, 60))
            raise SessionLost(f"{self._callee.vm} does not answer any more")

    async def acknowledge(self, result: GuestResult) -> None:
        """See the port."""
        self._life.check()
        self._host.laws.forgets(self._life.node, result.job_id, result.attempt)

    async def lost(self) -> Exception:
        """See the port: noticed some time after the guest is gone."""
        waits = [self._closed.wait()] + ([] if self._guest is None else [self._guest.gone.wait()])
        tasks = [asyncio.ensure_future(each) for each in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        if not self._closed.is_set():
            await self._life.pause(self._host.dice.uniform(0, 60))
        return SessionLost(f"{self._callee.vm} cannot be reached any more")

    def close(self) -> None:
        """See the port."""
        self._closed.set()

    async def _reach(self) -> tuple[Machine, Guest]:
        found = self._host.guests.running(self._callee.vm)
        if found is None or self._closed.is_set():
            raise SessionLost(f"{self._callee.vm} cannot be reached")
        return found

    async def _until_over(self, guest: Guest, given: Given) -> None:
        waits = [asyncio.ensure_future(each.wait()) for each in (given.done, guest.gone, self._closed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()


def _hotkey(life: Life) -> str:
    return f"validator-{life.node}"


def session_maker(host: Host, life: Life) -> Callable[..., SimulatedSession]:
    """Makes the sessions of one life with the CVMs of its host."""

    def make(
        callee: Callee,
        *,
        challenge_id: ChallengeId,
        env: Mapping[str, str],
        judge: Judge,
        values: ValuesHandler,
        pace: SessionPace | None = None,
        resume: bool = False,
    ) -> SimulatedSession:
        del challenge_id, env, values, pace
        return SimulatedSession(host, life, callee, judge, resume=resume)

    return make
