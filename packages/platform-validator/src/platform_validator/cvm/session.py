"""The attested session with the SDK in one CVM: dials, resumes after a break, carries one job at a time.

Reading, pinging and answering values happen in `run`, a task of the fleet; whoever calls `execute` waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmName
from platform_protocol.session.channel import SealedChannel
from platform_protocol.session.ends import ValidatorSession
from platform_protocol.session.errors import SessionError
from platform_protocol.session.messages import (
    CHUNK_BYTES,
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
    ValuesCas,
    ValuesDelete,
    ValuesGet,
    ValuesIncrement,
    ValuesList,
    ValuesResult,
    ValuesSet,
)
from platform_protocol.session.v2 import Offer, ValidatorHandshake
from platform_validator.cvm.errors import (
    AttestationRefused,
    AttestationUnavailable,
    SessionLost,
    SessionRefused,
)
from platform_validator.cvm.jobs import GuestResult, JobOrder

__all__ = ["CvmSession", "GuestResult", "JobOrder", "ValuesHandler"]

Values = ValuesGet | ValuesSet | ValuesDelete | ValuesList | ValuesIncrement | ValuesCas
Judge = Callable[[Offer], Awaitable[None]]
"""Accepts an offer, or raises AttestationRefused or AttestationUnavailable."""

_DIAL = 10.0
_HANDSHAKE = 60.0
_SEND = 30.0
_PING = 30.0
_UNANSWERED = 3
_RESUME_FOR = 60.0
_MAX_FRAME = 64 * 1024 * 1024

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class ValuesHandler(Protocol):
    """Answers a challenge's values requests; refusals are answers."""

    async def answer(self, challenge_id: ChallengeId, session_id: str, request: Values) -> ValuesResult:
        """Answer one; durable when it returns."""


@dataclass(slots=True)
class _Running:
    """The job that the session carries."""

    order: JobOrder
    submission: Path | None
    on_started: Callable[[], None]
    on_progress: Callable[[float, str], None]
    on_log: Callable[[str, str], None]
    result: asyncio.Future[GuestResult]
    began: float = 0.0
    logs: list[str] = field(default_factory=list)

    def started(self) -> None:
        """The SDK acknowledged it."""
        if not self.began:
            self.began = time.monotonic()
            self.on_started()


class CvmSession:
    """One session with one CVM.

    Args:
        address: (host, port) of the mapped SDK port. Never trusted.
        vm: The name that we gave.
        launch_secret: L of this VM.
        session_id: Journaled with the VM, so that a later process can resume.
        validator: Our address.
        challenge_id: Whose values the session may touch.
        env: Sent in `configure`, after the CVM was accepted.
        judge: The policy, over the handshake's offer.
        values: Answers values requests.
    """

    def __init__(
        self,
        *,
        address: tuple[str, int],
        vm: VmName,
        launch_secret: bytes,
        session_id: str,
        validator: Hotkey,
        challenge_id: ChallengeId,
        env: Mapping[str, str],
        judge: Judge,
        values: ValuesHandler,
    ) -> None:
        self._address = address
        self._vm = vm
        self._secret = launch_secret
        self._end = ValidatorSession(session_id)
        self._validator = validator
        self._challenge_id = challenge_id
        self._env = env
        self._judge = judge
        self._values = values
        self._socket: ClientConnection | None = None
        self._first = True
        self._closing = False
        self._running: _Running | None = None
        self._unanswered = 0
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
        """
        await self._or_lost(self._ready)

    async def execute(
        self,
        order: JobOrder,
        submission: Path | None,
        *,
        on_started: Callable[[], None],
        on_progress: Callable[[float, str], None],
        on_log: Callable[[str, str], None],
    ) -> GuestResult:
        """Have the SDK run a job and wait for its result, over any number of connections.

        Raises:
            SessionRefused: The SDK will not run it.
            SessionLost: The session cannot be resumed.
        """
        result: asyncio.Future[GuestResult] = asyncio.get_running_loop().create_future()
        self._running = _Running(order, submission, on_started, on_progress, on_log, result)
        try:
            await self._give_job(GuestState(configured=True))
            return await self._or_lost(result)
        finally:
            self._running = None

    async def cancel(self, job_id: JobId, reason: str) -> None:
        """Have the SDK end a job; a lost connection is no error."""
        await self._send(JobCancel(job_id=job_id, reason=reason[:1000]))

    async def acknowledge(self, result: GuestResult) -> None:
        """The result is durable here: the SDK may forget it."""
        await self._send_frame(self._end.done(result.seq))

    def close(self) -> None:
        """End `run`; the CVM is about to be destroyed."""
        self._closing = True
        if self._socket is not None:
            self._socket.transport.abort()
        self._give_up(SessionLost(f"the session with {self._vm} was closed"))

    async def run(self) -> None:
        """Keep a connection until closed or lost. Never raises; what it finds goes to whoever waits."""
        silent_since = time.monotonic()
        pause = 0.1
        while not self._closing:
            try:
                async with asyncio.timeout(_DIAL + _HANDSHAKE):
                    socket, hello = await self._dial()
            except (AttestationRefused, AttestationUnavailable, SessionRefused) as error:
                self._give_up(error)
                return
            except (SessionError, WebSocketException, TimeoutError, OSError) as error:
                if time.monotonic() - silent_since > _RESUME_FOR:
                    self._give_up(
                        SessionLost(f"{self._vm} cannot be reached for {_RESUME_FOR:.0f} s: {error!r}"[:500])
                    )
                    return
                await asyncio.sleep(pause)
                pause = min(2.0, pause * 2)
                continue
            if not hello.known and not self._first:
                await self._abandon(socket)
                self._give_up(SessionLost(f"{self._vm} rebooted: it does not know the session"))
                return
            self._first = False
            pause = 0.1
            await self._converse(socket, hello)
            silent_since = time.monotonic()
            self.reconnects += 1

    async def _dial(self) -> tuple[ClientConnection, GuestHello]:
        host, port = self._address
        socket = await connect(
            f"ws://{host}:{port}/sdk/ws",
            open_timeout=_DIAL,
            close_timeout=2,
            ping_interval=None,
            compression=None,
            max_size=_MAX_FRAME,
            proxy=None,
        )
        try:
            channel = await self._handshake(socket)
            self._end.connected(channel)
            hello = self._end.receive(_binary(await socket.recv()))
            await socket.send(self._end.hello())
        except BaseException:
            self._end.disconnected()
            await self._abandon(socket)
            raise
        return socket, _greeting(hello)

    async def _handshake(self, socket: ClientConnection) -> SealedChannel:
        handshake = ValidatorHandshake(
            launch_secret=self._secret,
            vm=self._vm,
            validator=self._validator,
            session_id=self._end.session_id,
            resume=not self._first,
        )
        await socket.send(handshake.begin())
        offer = handshake.receive(_text(await socket.recv()))
        try:
            await self._judge(offer)
        except (AttestationRefused, AttestationUnavailable) as error:
            with contextlib.suppress(WebSocketException):
                await socket.send(handshake.reject(type(error).__name__))
            raise
        accepted, channel = handshake.accept()
        await socket.send(accepted)
        if not isinstance(channel, SealedChannel):
            raise SessionRefused("session version 1 is not offered here")
        return channel

    async def _converse(self, socket: ClientConnection, hello: GuestHello) -> None:
        self._socket, self._unanswered = socket, 0
        try:
            async with asyncio.TaskGroup() as tasks:
                pinging = tasks.create_task(self._ping(socket))
                tasks.create_task(self._pick_up(hello.state))
                async for frame in socket:
                    message = self._end.receive(_binary(frame))
                    if message is not None:
                        self._take(message, tasks)
                pinging.cancel()
        except* (SessionError, WebSocketException, TimeoutError, OSError) as errors:
            _log.info("session_broke", vm=self._vm, reason=repr(errors.exceptions[0])[:300])
        finally:
            self._socket = None
            self._end.disconnected()
            await self._abandon(socket)

    async def _pick_up(self, state: GuestState) -> None:
        """Go on where the SDK is."""
        if not state.configured:
            await self._send(Configure(env=dict(self._env), challenge_id=self._challenge_id))
        if self._running is not None:
            await self._give_job(state)

    async def _give_job(self, state: GuestState) -> None:
        running = self._running
        if running is None:
            return
        order = running.order
        ours = state.job_id == order.job_id
        if ours and state.job in ("running", "done"):
            running.started()
            return
        if not ours:
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
        if running.submission is not None:
            await self._send_submission(running, state.submission_bytes if ours else 0)

    async def _send_submission(self, running: _Running, offset: int) -> None:
        path = running.submission
        if path is None:
            return
        size = (await asyncio.to_thread(path.stat)).st_size
        while True:
            data = await asyncio.to_thread(_read_chunk, path, offset)
            last = offset + len(data) >= size
            sent = await self._send(
                SubmissionChunk(job_id=running.order.job_id, offset=offset, last=last, data=data)
            )
            if last or not sent:
                return
            offset += len(data)

    def _take(self, message: GuestMessage, tasks: asyncio.TaskGroup) -> None:
        if isinstance(message, Pong):
            self._unanswered = 0
        elif isinstance(message, Ready):
            if not self._ready.done():
                self._ready.set_result(None)
            tasks.create_task(self._send_frame(self._end.done(message.seq)))
        elif isinstance(message, Values):
            tasks.create_task(self._answer(message))
        elif isinstance(message, GuestError):
            self._refused(message)
            tasks.create_task(self._send_frame(self._end.done(message.seq)))
        elif isinstance(message, JobResult):
            self._finished(message)
        elif self._running is not None:
            _told(self._running, message)

    def _finished(self, message: JobResult) -> None:
        running = self._running
        if running is None or message.job_id != running.order.job_id or running.result.done():
            return
        running.started()
        running.result.set_result(
            GuestResult(
                job_id=message.job_id,
                attempt=running.order.attempt,
                result=message.result,
                error=message.error,
                evidence=message.evidence,
                execution_time_ms=int((time.monotonic() - running.began) * 1000),
                seq=message.seq,
            )
        )

    def _refused(self, message: GuestError) -> None:
        error = SessionRefused(f"the SDK in {self._vm} says {message.code}: {message.message}"[:1000])
        if not self._ready.done():
            self._ready.set_exception(error)
            return
        running = self._running
        if running is not None and not running.result.done():
            running.result.set_exception(error)

    async def _answer(self, request: Values) -> None:
        answer = await self._values.answer(self._challenge_id, self._end.session_id, request)
        await self._send(answer)
        await self._send_frame(self._end.done(request.seq))

    async def _ping(self, socket: ClientConnection) -> None:
        for number in range(2**31):
            await asyncio.sleep(_PING)
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
            async with asyncio.timeout(_SEND):
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

    @staticmethod
    async def _abandon(socket: ClientConnection) -> None:
        socket.transport.abort()
        with contextlib.suppress(WebSocketException, TimeoutError, OSError):
            async with asyncio.timeout(2):
                await socket.wait_closed()


def _told(running: _Running, message: GuestMessage) -> None:
    """A line about the job that runs."""
    if isinstance(message, JobProgress) and message.job_id == running.order.job_id:
        running.started()
        running.on_progress(message.percent, message.message)
    elif isinstance(message, Log):
        running.on_log(message.level, message.message)


def _read_chunk(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)


def _greeting(message: GuestMessage | None) -> GuestHello:
    if not isinstance(message, GuestHello):
        raise SessionError("expected the SDK's hello first")
    return message


def _text(frame: str | bytes) -> str:
    if isinstance(frame, bytes):
        raise SessionError("expected a text frame")
    return frame


def _binary(frame: str | bytes) -> bytes:
    if isinstance(frame, str):
        raise SessionError("expected a binary frame")
    return frame
