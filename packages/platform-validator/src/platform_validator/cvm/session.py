"""The attested session with the SDK in one CVM: dials, resumes after a break, carries its jobs.

Reading, pinging and answering values happen in `run`, a task of the fleet; whoever calls `execute` waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import WebSocketException

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.session.channel import MAX_FRAMES, SealedChannel
from platform_protocol.session.ends import ValidatorSession
from platform_protocol.session.errors import MessageInvalid, SessionError
from platform_protocol.session.messages import (
    Configure,
    GuestError,
    GuestHello,
    GuestMessage,
    GuestState,
    JobCancel,
    JobExecute,
    JobProgress,
    JobResult,
    Log,
    Ping,
    Pong,
    Ready,
    SubmissionChunk,
    ValidatorMessage,
    ValuesRequest,
    ValuesResult,
    WeightsRequest,
    WeightsResponse,
    guest_message,
)
from platform_protocol.session.v1 import EnvelopeChannel
from platform_validator.cvm.connection import Callee, Judge, SessionPace, abandon, bytes_of, dial
from platform_validator.cvm.errors import AttestationUnavailable, SessionLost, SessionRefused
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.reading import read_message
from platform_validator.cvm.running import RunningJob
from platform_validator.cvm.session_v1 import SessionV1
from platform_validator.errors import ValidatorError

__all__ = ["CvmSession", "GuestResult", "JobOrder", "ValuesHandler"]

_UNANSWERED = 3
_ANSWERS = 64
_UNREADABLE = 5
_AT_WORK = 64
"""Answers and acknowledgements on their way at once; at so many nothing more is read from the guest."""
_REKEY_FRAMES = MAX_FRAMES // 2
"""Frames in one direction after which a connection is made anew, with new keys."""
_NOW = (SessionError, WebSocketException, TimeoutError, OSError)
"""What ends a connection and not the session."""

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class ValuesHandler(Protocol):
    """Answers a challenge's values requests; refusals are answers."""

    async def answer(
        self, challenge_id: ChallengeId, session_id: str, request: ValuesRequest
    ) -> ValuesResult:
        """Answer one; durable when it returns."""


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
        self._end = ValidatorSession(callee.session_id)
        self._challenge_id = challenge_id
        self._env = env
        self._judge = judge
        self._values = values
        self._pace = pace or SessionPace()
        self._socket: ClientConnection | None = None
        self._picked_up = False
        self._pong = asyncio.Event()
        self._old: SessionV1 | None = None
        self._first = not resume
        self._adopted = resume
        self._state = GuestState(configured=True)
        self._early: dict[JobId, JobResult] = {}
        self._result_bytes: int | None = None
        self._unreadable = 0
        self._closing = False
        self._running: dict[JobId, RunningJob] = {}
        self._left: set[JobId] = set()
        self._unanswered = 0
        self._channel: SealedChannel | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._at_work: set[asyncio.Task[None]] = set()
        self._due: list[int] = []
        self._answers: OrderedDict[str, ValuesResult] = OrderedDict()
        self._asked: dict[str, tuple[WeightsRequest, asyncio.Future[dict[str, float]]]] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
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
        if order.job_id in self._running or (self._old is not None and self._running):
            raise SessionRefused(f"{self._vm} is given a job beside another that it cannot run at once")
        running = RunningJob(order, submission, on_started, on_progress, on_log, result)
        self._running[order.job_id] = running
        self._left.discard(order.job_id)
        try:
            if self._old is not None:
                await self._over_v1(self._old, running)
            elif (early := self._early.pop(order.job_id, None)) is not None:
                self._finished(early)
            elif self._picked_up:
                await self._give_job(running, self._state)
            return await self._or_lost(result)
        finally:
            del self._running[order.job_id]

    async def weights(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Ask the challenge for weights over results.

        Raises:
            SessionRefused: It has none, and says why.
            SessionLost: The session cannot be resumed.
        """
        request = WeightsRequest(request_id=str(uuid.uuid4()), results=results)
        answer: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()
        self._asked[request.request_id] = request, answer
        try:
            await self._send(request)
            return await self._or_lost(answer)
        finally:
            del self._asked[request.request_id]

    async def cancel(self, job_id: JobId, reason: str) -> None:
        """Have the SDK end a job; a lost connection is no error."""
        await self._send(JobCancel(job_id=job_id, reason=reason[:1000]))

    async def confirm(self) -> None:
        """Return once the SDK answers a ping, over this connection or a resumed one.

        Raises:
            SessionLost: It does not, or not in time.
        """
        if self._old is not None:
            # Version 1 answers no pings while a handler runs; a broken connection is lost at once.
            return
        self._pong.clear()
        ponged = asyncio.ensure_future(self._ponged())
        try:
            async with asyncio.timeout(self._pace.resume_for):
                await self._or_lost(ponged)
        except TimeoutError as error:
            raise SessionLost(f"{self._vm} does not answer any more") from error
        finally:
            ponged.cancel()

    async def _ponged(self) -> None:
        while not self._pong.is_set():
            await self._send(Ping(n=0))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.retry_most):
                    await self._pong.wait()

    async def acknowledge(self, result: GuestResult) -> None:
        """The result is durable here: the SDK may forget it."""
        if result.seq:
            await self._ack(result.seq)

    async def lost(self) -> Exception:
        """Wait until the session can go on no more; why."""
        return await asyncio.shield(self._lost)

    def close(self) -> None:
        """End `run`; the CVM is about to be destroyed."""
        self._closing = True
        if self._socket is not None:
            self._socket.transport.abort()
        self._give_up(SessionLost(f"the session with {self._vm} was closed"))

    async def run(self) -> None:
        """Keep a connection until closed or lost. Never raises; what it finds goes to whoever waits."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    await self._keep_connected()
                except ValidatorError as error:
                    self._give_up(error)
        except Exception as error:  # noqa: BLE001 - a fault over one guest's words ends its session, loudly
            _log.exception("session_fault", vm=self._vm)
            self._give_up(SessionLost(f"the session with {self._vm} failed: {error!r}"[:500]))
        finally:
            self._give_up(SessionLost(f"the session with {self._vm} has ended"))

    async def _keep_connected(self) -> None:
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
            await self._converse(socket, hello)
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
        held = [each.job_id for each in hello.state.jobs or ()]
        self._left = {*held, *([hello.state.job_id] if hello.state.job_id else [])}
        if not self._ready.done():
            self._ready.set_result(None)

    async def _connect(self) -> tuple[ClientConnection, GuestHello | None]:
        """A greeted connection; its hello is None in version 1."""
        socket, channel = await dial(self._callee, resume=not self._first, judge=self._judge, pace=self._pace)
        if isinstance(channel, EnvelopeChannel):
            self._old = SessionV1(socket, channel, self._vm)
            return socket, None
        try:
            async with asyncio.timeout(self._pace.dial):
                return socket, await self._greet(socket, channel)
        except BaseException:
            self._end.disconnected()
            await abandon(socket)
            raise

    async def _greet(self, socket: ClientConnection, channel: SealedChannel) -> GuestHello:
        self._end.connected(channel)
        self._channel = channel
        hello = self._end.receive(bytes_of(await socket.recv()))
        if not isinstance(hello, GuestHello):
            raise SessionError("expected the SDK's hello first")
        await socket.send(self._end.hello())
        return hello

    async def _converse(self, socket: ClientConnection, hello: GuestHello) -> None:
        self._socket, self._unanswered, self._state = socket, 0, hello.state
        try:
            async with asyncio.TaskGroup() as tasks:
                pinging = tasks.create_task(self._ping(socket))
                tasks.create_task(self._pick_up(hello.state))
                async for frame in socket:
                    await self._hear(bytes_of(frame))
                pinging.cancel()
        except* _NOW as errors:
            self._unreadable += errors.subgroup(MessageInvalid) is not None
            _log.info("session_broke", vm=self._vm, reason=repr(errors.exceptions[0])[:300])
        finally:
            self._socket, self._picked_up = None, False
            self._end.disconnected()
            await abandon(socket)

    async def _hear(self, frame: bytes) -> None:
        read = await read_message(self._end.open(frame))
        message = self._end.accept(guest_message(read.value))
        if isinstance(message, JobResult):
            self._result_bytes = read.result_bytes
        if message is not None:
            while len(self._at_work) >= _AT_WORK:
                await asyncio.wait(self._at_work, return_when=asyncio.FIRST_COMPLETED)
            self._take(message)

    async def _converse_v1(self, socket: ClientConnection) -> None:
        old = self._old
        _log.warning("session_v1", vm=self._vm, why="the challenge speaks version 1 of the session")
        try:
            if old is not None and not self._closing:
                self._socket = socket
                await old.begin()
                if not self._ready.done():
                    self._ready.set_result(None)
                await old.listen()
        except _NOW as error:
            _log.info("session_broke", vm=self._vm, reason=repr(error)[:300])
        finally:
            self._socket = self._old = None
            await abandon(socket)

    async def _over_v1(self, old: SessionV1, running: RunningJob) -> None:
        try:
            async with asyncio.timeout(self._pace.send):
                await old.give(running)
        except _NOW as error:
            raise SessionLost(f"the connection to {self._vm} broke: {error!r}"[:500]) from error

    async def _pick_up(self, state: GuestState) -> None:
        """Go on where the SDK is."""
        if not state.configured:
            await self._send(Configure(env=dict(self._env), challenge_id=self._challenge_id))
        # What was sent before may have been lost on the way: answers and requests go by their ids, once.
        for answer in list(self._answers.values()):
            await self._send(answer)
        for request, _ in list(self._asked.values()):
            await self._send(request)
        due, self._due = self._due, []
        for seq in due:
            await self._ack(seq)
        # From here on `execute` gives its job itself; one that is waiting already is given now.
        self._picked_up = True
        for running in list(self._running.values()):
            await self._give_job(running, state)
        for held in state.jobs or ():
            # A cancellation that was lost with its connection.
            if held.job != "done" and held.job_id not in self._running and held.job_id not in self._left:
                await self.cancel(held.job_id, "nobody waits for it")

    async def _give_job(self, running: RunningJob, state: GuestState) -> None:
        socket, order = self._socket, running.order
        there = state.of(order.job_id, order.attempt)
        if there is not None and there.job in ("running", "done"):
            running.started()
            return
        if there is None:
            running.given = True
            await self._send(
                JobExecute(
                    job_id=order.job_id,
                    attempt=order.attempt,
                    challenge_id=order.challenge_id,
                    job_name=order.job_name,
                    payload=order.payload,
                    submission_sha256=order.submission_sha256,
                )
            )
        offset, last = 0 if there is None else there.submission_bytes, running.submission is None
        # A new connection picks up by itself, at the offset that the SDK tells.
        while not last and self._socket is socket:
            data, last = await running.chunk(offset)
            await self._send(SubmissionChunk(job_id=order.job_id, offset=offset, last=last, data=data))
            offset += len(data)

    def _take(self, message: GuestMessage) -> None:
        match message:
            case Pong():
                self._unanswered = 0
                self._pong.set()
            case JobProgress() | Log():
                self._told(message)
            case Ready():
                if not self._ready.done():
                    self._ready.set_result(None)
                self._do(self._ack(message.seq))
            case GuestError():
                self._refused(message)
                self._do(self._ack(message.seq))
            case WeightsResponse():
                self._weighed(message)
                self._do(self._ack(message.seq))
            case JobResult():
                self._finished(message)
            case GuestHello():
                raise SessionError("expected one hello, first")
            case _:
                self._do(self._answer(message))

    def _told(self, message: JobProgress | Log) -> None:
        named = self._running.get(message.job_id) if message.job_id is not None else None
        if named is not None:
            named.started()
        if isinstance(message, JobProgress):
            if named is not None:
                named.on_progress(message.percent, message.message)
        elif named is not None:
            named.on_log(message.level, message.message)
        elif len(self._running) == 1:
            # What the challenge says by itself belongs to the one job that runs.
            next(iter(self._running.values())).on_log(message.level, message.message)

    def _finished(self, message: JobResult) -> None:
        running = self._running.get(message.job_id)
        if running is None and message.job_id in self._left:
            # Of a job that an earlier process gave: whoever adopts it will ask for it.
            self._early[message.job_id] = message
            return
        other = running is not None and message.attempt not in {None, running.order.attempt}
        if running is None or other or running.result.done():
            # Nobody waits for it (cancelled, timed out, a second one): it must not hold up the others.
            _log.info("result_unwanted", vm=self._vm, job_id=message.job_id)
            self._do(self._ack(message.seq))
            return
        running.finish(
            result=message.result,
            error=message.error,
            evidence=message.evidence,
            seq=message.seq,
            result_bytes=self._result_bytes,
        )

    def _refused(self, message: GuestError) -> None:
        error = SessionRefused(f"the SDK in {self._vm} says {message.code}: {message.message}"[:1000])
        if not self._ready.done():
            self._ready.set_exception(error)
            return
        named = self._running.get(JobId(message.request_id or ""))
        for running in self._running.values() if named is None else (named,):
            running.fail(error)

    def _weighed(self, message: WeightsResponse) -> None:
        _, answer = self._asked.get(message.request_id, (None, None))
        if answer is None or answer.done():
            return
        if message.error is not None or message.weights is None:
            said = message.error.message if message.error is not None else "no weights"
            answer.set_exception(SessionRefused(f"the challenge gives no weights: {said}"[:1000]))
        else:
            answer.set_result(message.weights)

    async def _answer(self, request: ValuesRequest) -> None:
        answer = await self._values.answer(self._challenge_id, self._end.session_id, request)
        self._answers[request.request_id] = answer
        if len(self._answers) > _ANSWERS:
            self._answers.popitem(last=False)
        await self._send(answer)
        await self._ack(request.seq)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Work that outlives the connection that asked for it."""
        if self._tasks is None:
            work.close()
            return
        task = self._tasks.create_task(work)
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)

    async def _ack(self, seq: int) -> None:
        """Its effect is durable. Without a connection it waits: a frame that is not sent costs a number."""
        if self._socket is None:
            self._due.append(seq)
            return
        await self._send_frame(self._end.done(seq))

    async def _ping(self, socket: ClientConnection) -> None:
        began = time.monotonic()
        for number in range(2**31):
            await asyncio.sleep(self._pace.ping)
            frames = 0 if self._channel is None else self._channel.frames
            if frames >= _REKEY_FRAMES or time.monotonic() - began >= self._pace.rekey:
                _log.info("session_rekeyed", vm=self._vm, frames=frames)
                socket.transport.abort()
                return
            if self._unanswered >= _UNANSWERED:
                socket.transport.abort()
                return
            self._unanswered += 1
            await self._send(Ping(n=number))

    async def _send(self, message: ValidatorMessage) -> bool:
        """Send if there is a greeted connection; what is lost is made up for after the resume."""
        if self._socket is None or not self._end.greeted:
            return False
        await self._send_frame(self._end.send(message))
        return True

    async def _send_frame(self, frame: bytes | None) -> None:
        socket = self._socket
        if frame is None or socket is None:
            return
        try:
            async with asyncio.timeout(self._pace.send):
                await socket.send(frame)
        except (WebSocketException, TimeoutError, OSError):
            socket.transport.abort()

    async def _or_lost(self, wanted: asyncio.Future[_T]) -> _T:
        either: list[asyncio.Future[Any]] = [wanted, self._lost]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise self._lost.result()

    def _give_up(self, error: Exception) -> None:
        if not self._lost.done():
            self._lost.set_result(error)
