"""The attested session with the SDK in one CVM: dials, resumes after a break, carries its jobs.

Reading, pinging and answering values happen in `run`, a task of the fleet; whoever calls `execute` waits.
The rooms behind it: `session_link` (the connection of the moment), `session_inbox` (what the guest says),
`session_jobs`, `session_requests`, and `session_v1` for challenges that speak no other version.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import structlog
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import WebSocketException

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.session.errors import MessageInvalid, SessionError
from platform_protocol.session.messages import Configure, GuestHello, GuestState
from platform_protocol.session.v1 import EnvelopeChannel
from platform_validator.cvm.connection import Callee, Judge, SessionPace, abandon, dial
from platform_validator.cvm.errors import AttestationUnavailable, SessionLost, SessionRefused
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.running import RunningJob
from platform_validator.cvm.session_inbox import SessionInbox
from platform_validator.cvm.session_jobs import SessionJobs
from platform_validator.cvm.session_link import SessionLink
from platform_validator.cvm.session_requests import SessionRequests
from platform_validator.cvm.session_v1 import SessionV1
from platform_validator.cvm.sessions import ValuesHandler
from platform_validator.errors import ValidatorError

__all__ = ["CvmSession", "GuestResult", "JobOrder", "ValuesHandler"]

_UNREADABLE = 5
"""Connections that ended with a message which could not be read, after which the session does."""
_NOW = (SessionError, WebSocketException, TimeoutError, OSError)
"""What ends a connection and not the session."""

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class CvmSession:
    """One session with one CVM.

    Args:
        callee: The CVM.
        challenge_id: Whose values the session may touch.
        env: Sent in `configure`, after the CVM was accepted.
        judge: The policy, over the handshake's offer.
        values: Answers values requests.
        pace: How long things may take.
        resume: The session was begun by an earlier process: the SDK must know it, configured.
    """

    def __init__(
        self,
        callee: Callee,
        *,
        challenge_id: ChallengeId,
        env: Mapping[str, str],
        judge: Judge,
        values: ValuesHandler,
        pace: SessionPace | None = None,
        resume: bool = False,
    ) -> None:
        self._callee = callee
        self._vm = callee.vm
        self._challenge_id = challenge_id
        self._env = env
        self._judge = judge
        self._pace = pace or SessionPace()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._link = SessionLink(callee.session_id, self._vm, self._pace)
        self._jobs = SessionJobs(self._link, self._vm)
        self._requests = SessionRequests(self._link, challenge_id, values)
        self._inbox = SessionInbox(self._link, self._jobs, self._requests, ready=self._ready, vm=self._vm)
        self._old: SessionV1 | None = None
        self._first = not resume
        self._adopted = resume
        self._unreadable = 0
        self._closing = False
        self.reconnects = 0

    async def ready(self) -> None:
        """Wait until the SDK is attested, configured and says `ready`.

        Raises:
            AttestationRefused: The policy refused it.
            AttestationUnavailable: It could not be judged.
            SessionRefused: The SDK refused, or its start-up handlers failed.
            SessionLost: It cannot be reached.
            StoreUnavailable: The finding could not be journaled.
        """
        await self._or_lost(self._ready)

    async def execute(
        self,
        order: JobOrder,
        submission: Path | None,
        *,
        on_started: Callable[[bool], None],
        on_progress: Callable[[float, str], None],
        on_log: Callable[[str, str], None],
    ) -> GuestResult:
        """Have the SDK run a job and wait for its result, over any number of connections.

        Raises:
            SessionRefused: The SDK will not run it.
            SessionLost: The session cannot be resumed.
        """
        result: asyncio.Future[GuestResult] = asyncio.get_running_loop().create_future()
        if order.job_id in self._jobs or (self._old is not None and self._jobs):
            raise SessionRefused(f"{self._vm} is given a job beside another that it cannot run at once")
        running = RunningJob(order, submission, on_started, on_progress, on_log, result)
        self._jobs.add(running)
        try:
            if self._old is not None:
                await self._over_v1(self._old, running)
            else:
                await self._jobs.begin(running)
            return await self._or_lost(result)
        finally:
            self._jobs.remove(running)

    async def weights(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Ask the challenge for weights over results.

        Raises:
            SessionRefused: It has none, and says why.
            SessionLost: The session cannot be resumed.
        """
        return await self._unless_lost(self._requests.ask_weights(results))

    async def cancel(self, job_id: JobId, reason: str) -> None:
        """Have the SDK end a job; a lost connection is no error."""
        await self._jobs.cancel(job_id, reason)

    async def confirm(self) -> None:
        """Return once the SDK answers a ping, over this connection or a resumed one.

        Raises:
            SessionLost: It does not, or not in time.
        """
        if self._old is not None:
            # Version 1 answers no pings while a handler runs; a broken connection is lost at once.
            return
        try:
            async with asyncio.timeout(self._pace.resume_for):
                await self._unless_lost(self._link.answered())
        except TimeoutError as error:
            raise SessionLost(f"{self._vm} does not answer any more") from error

    async def acknowledge(self, result: GuestResult) -> None:
        """The result is durable here: the SDK may forget it."""
        if result.seq:
            await self._link.acknowledge(result.seq)

    async def lost(self) -> Exception:
        """Wait until the session can go on no more; why."""
        return await asyncio.shield(self._lost)

    def close(self) -> None:
        """End `run`; the CVM is about to be destroyed."""
        self._closing = True
        self._link.cut()
        self._give_up(SessionLost(f"the session with {self._vm} was closed"))

    async def run(self) -> None:
        """Keep a connection until closed or lost. Never raises; what it finds goes to whoever waits."""
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    await self._keep_connected(tasks)
                except ValidatorError as error:
                    self._give_up(error)
        except Exception as error:  # noqa: BLE001 - a fault over one guest's words ends its session, loudly
            _log.exception("session_fault", vm=self._vm)
            self._give_up(SessionLost(f"the session with {self._vm} failed: {error!r}"[:500]))
        finally:
            self._give_up(SessionLost(f"the session with {self._vm} has ended"))

    async def _keep_connected(self, tasks: asyncio.TaskGroup) -> None:
        reached = time.monotonic()
        pause = self._pace.retry
        while not self._closing:
            try:
                socket, hello = await self._connect()
            except (*_NOW, AttestationUnavailable) as error:
                # A guest that was accepted once is not given up for collateral that is away for a moment.
                if self._first and isinstance(error, AttestationUnavailable):
                    if not error.passing:
                        raise
                    # It answers: how long it is waited for is the boot's affair.
                    reached = time.monotonic()
                if time.monotonic() - reached >= self._pace.resume_for:
                    raise SessionLost(f"{self._vm} cannot be reached any more: {error!r}"[:500]) from error
                await asyncio.sleep(pause)
                pause = min(self._pace.retry_most, pause * 2)
                continue
            if hello is None:
                await self._converse_v1(socket)
                raise SessionLost(f"the connection to {self._vm} broke, and version 1 cannot resume")
            if not hello.known and not self._first:
                await abandon(socket)
                raise SessionLost(f"{self._vm} rebooted: it does not know the session")
            if self._adopted:
                await self._take_over(socket, hello)
            self._first, pause = False, self._pace.retry
            await self._converse(socket, hello, tasks)
            if self._unreadable >= _UNREADABLE:
                raise SessionLost(f"{self._vm} sends what cannot be read")
            reached = time.monotonic()
            self.reconnects += 1

    async def _take_over(self, socket: ClientConnection, hello: GuestHello) -> None:
        """What an earlier process began goes on only if it came as far as `ready`."""
        if not hello.state.configured:
            await abandon(socket)
            raise SessionLost(f"{self._vm} was never configured")
        self._adopted = False
        self._jobs.adopt(hello.state)
        if not self._ready.done():
            self._ready.set_result(None)

    async def _connect(self) -> tuple[ClientConnection, GuestHello | None]:
        """A greeted connection; its hello is None in version 1."""
        socket, channel = await dial(self._callee, resume=not self._first, judge=self._judge, pace=self._pace)
        if isinstance(channel, EnvelopeChannel):
            self._old = SessionV1(socket, channel, self._vm)
            return socket, None
        return socket, await self._link.greet(socket, channel)

    async def _converse(
        self, socket: ClientConnection, hello: GuestHello, outliving: asyncio.TaskGroup
    ) -> None:
        """Over one connection, until it breaks; work in `outliving` goes on after it."""
        self._link.up(socket)
        try:
            async with asyncio.TaskGroup() as tasks:
                pinging = tasks.create_task(self._link.keep_alive(socket))
                tasks.create_task(self._pick_up(hello.state))
                async for frame in socket:
                    if (heard := await self._link.read(frame)) is not None:
                        await self._inbox.take(heard, outliving)
                pinging.cancel()
        except* _NOW as errors:
            self._unreadable += errors.subgroup(MessageInvalid) is not None
            _log.info("session_broke", vm=self._vm, reason=repr(errors.exceptions[0])[:300])
        finally:
            self._jobs.down()
            await self._link.down(socket)

    async def _pick_up(self, state: GuestState) -> None:
        """Go on where the SDK is: what was sent before may have been lost on the way."""
        if not state.configured:
            await self._link.send(Configure(env=dict(self._env), challenge_id=self._challenge_id))
        await self._requests.resend()
        await self._link.acknowledge_due()
        await self._jobs.pick_up(state)

    async def _converse_v1(self, socket: ClientConnection) -> None:
        if not self._first:
            # It was begun by an earlier process, or in version 2: what ran then is lost with that connection.
            self._old = None
            await abandon(socket)
            raise SessionLost(f"{self._vm} answers in version 1, which cannot resume")
        old = self._old
        _log.warning(
            "session_v1",
            vm=self._vm,
            why="the challenge speaks version 1 of the session",
            environment_not_given=sorted(self._env),
        )
        try:
            if old is not None and not self._closing:
                self._link.up(socket)
                await old.begin()
                if not self._ready.done():
                    self._ready.set_result(None)
                await old.listen()
        except _NOW as error:
            _log.info("session_broke", vm=self._vm, reason=repr(error)[:300])
        finally:
            self._old = None
            await self._link.down(socket)

    async def _over_v1(self, old: SessionV1, running: RunningJob) -> None:
        try:
            async with asyncio.timeout(self._pace.send):
                await old.give(running)
        except _NOW as error:
            raise SessionLost(f"the connection to {self._vm} broke: {error!r}"[:500]) from error

    async def _or_lost(self, wanted: asyncio.Future[_T]) -> _T:
        either: list[asyncio.Future[Any]] = [wanted, self._lost]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise self._lost.result()

    async def _unless_lost(self, work: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.ensure_future(work)
        try:
            return await self._or_lost(task)
        finally:
            task.cancel()

    def _give_up(self, error: Exception) -> None:
        if not self._lost.done():
            self._lost.set_result(error)
