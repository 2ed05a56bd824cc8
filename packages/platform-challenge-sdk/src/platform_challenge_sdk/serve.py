"""Serves a challenge on port 10000: health over HTTP, sessions over WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.challenge import challenge as the_challenge
from platform_challenge_sdk.job import JobRun
from platform_challenge_sdk.values import Values
from platform_protocol.ids import ChallengeId, Hotkey, VmName
from platform_protocol.session.channel import SealedChannel
from platform_protocol.session.ends import ChallengeSession
from platform_protocol.session.errors import (
    AttestationRejected,
    AuthRefused,
    FrameInvalid,
    HandshakeInvalid,
    MessageInvalid,
)
from platform_protocol.session.messages import (
    Configure,
    GuestError,
    GuestMessage,
    GuestState,
    JobCancel,
    JobError,
    JobExecute,
    JobResult,
    Ping,
    Pong,
    Ready,
    SubmissionChunk,
    ValidatorMessage,
    ValuesResult,
    WeightsRequest,
    WeightsResponse,
)
from platform_protocol.session.v2 import Begin, ChallengeHandshake
from platform_protocol.user_config import UserConfig

PORT = 10000
_HANDSHAKE = 10.0
_MAX_FRAME = 64 * 1024 * 1024
_SILENCE = 15 * 60.0
_AUTH_REFUSED, _HANDSHAKE_INVALID, _FRAME_INVALID, _BUSY, _REPLACED = 4403, 4400, 4401, 1013, 4409
_MAX_ERROR = 4096


@dataclass(slots=True)
class Health:
    """What `/sdk/health` says."""

    status: str = "starting"
    error: str | None = None

    def body(self) -> bytes:
        """JSON, at most 4 KiB of error."""
        value = {"status": self.status}
        if self.error is not None:
            value["error"] = self.error.encode("utf-8", "replace")[:_MAX_ERROR].decode("utf-8", "ignore")
        return json.dumps(value).encode()


@dataclass(slots=True)
class ChallengeServer:
    """One challenge, one validator, one live connection; at most one job at a time.

    `per_job`: a VM that takes one job in its life.
    """

    challenge: Challenge
    config: UserConfig
    health: Health
    agent: Agent = field(default_factory=Agent)
    max_result: int = 1024 * 1024
    per_job: bool = True
    scratch: Path = Path(tempfile.gettempdir())
    _seen: set[bytes] = field(default_factory=set)
    _session: ChallengeSession | None = None
    _live: ServerConnection | None = None
    _handshaking: bool = False
    _validator: Hotkey | None = None
    _values: Values | None = None
    _challenge_id: ChallengeId | None = None
    _job: JobRun | None = None
    _job_task: asyncio.Task[None] | None = None
    _tasks: asyncio.TaskGroup | None = None
    _outgoing: asyncio.Queue[tuple[ServerConnection, bytes]] = field(default_factory=asyncio.Queue)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    last_frame: float = field(default_factory=time.monotonic)

    async def serve(self, host: str = "0.0.0.0", port: int = PORT, stop: asyncio.Event | None = None) -> None:
        """Serve until `stop`, the end of the VM's lifetime, or 15 min of a job's silence."""
        stop = stop or asyncio.Event()
        async with self.listen(host, port), asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            sender = tasks.create_task(self._send_all())
            await self._watch(stop)
            sender.cancel()
            if self._job_task is not None:
                self._job_task.cancel()
            with contextlib.suppress(Exception):
                await self.challenge.call("cleanup")

    def listen(self, host: str, port: int) -> contextlib.AbstractAsyncContextManager[Server]:
        """The listening server (websockets' own context manager)."""
        return serve_websocket(
            self._connected,
            host,
            port,
            process_request=self._process_request,
            max_size=_MAX_FRAME,
            compression=None,
            ping_interval=None,
            close_timeout=2,
        )

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/sdk/ws":
            if self.health.status == "ready":
                return None
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "not ready\n")
        if request.path == "/sdk/health":
            response = connection.respond(HTTPStatus.OK, self.health.body().decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
            return response
        return connection.respond(HTTPStatus.NOT_FOUND, "not found\n")

    async def _watch(self, stop: asyncio.Event) -> None:
        """Until stopped, or silent for too long: 15 min with a job, else the VM's lifetime."""
        while not stop.is_set():
            idle = time.monotonic() - self.last_frame
            limit = _SILENCE if self._job is not None else float(self.config.max_lifetime_s)
            if idle >= limit:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(5.0, limit - idle)):
                    await stop.wait()

    async def _connected(self, connection: ServerConnection) -> None:
        if self._handshaking:
            await connection.close(_BUSY, "another handshake is pending")
            return
        self._handshaking = True
        try:
            async with asyncio.timeout(_HANDSHAKE):
                session = await self._handshake(connection)
        except AuthRefused as error:
            await connection.close(_AUTH_REFUSED, str(error)[:100])
            return
        except (HandshakeInvalid, AttestationRejected, FrameInvalid, MessageInvalid, TimeoutError) as error:
            await connection.close(_HANDSHAKE_INVALID, (str(error) or "handshake timed out")[:100])
            return
        except ConnectionClosed:
            return
        finally:
            self._handshaking = False
        await self._converse(connection, session)

    async def _handshake(self, connection: ServerConnection) -> ChallengeSession:
        handshake = ChallengeHandshake(
            launch_secret=self.config.secret, vm=VmName(self.config.vm), seen_nonces=self._seen
        )
        begin = handshake.receive_begin(_text(await connection.recv()))
        quote = await self.agent.quote(begin.report_data)
        await connection.send(handshake.respond(quote.quote, quote.event_log, quote.vm_config))
        channel = handshake.receive_verdict(_text(await connection.recv()))
        return await self._greet(connection, channel, begin)

    async def _greet(
        self, connection: ServerConnection, channel: SealedChannel, begin: Begin
    ) -> ChallengeSession:
        known = self._session is not None and self._session.session_id == begin.session_id
        session = self._session if known and self._session else ChallengeSession(begin.session_id)
        await connection.send(session.greet(channel, known=known, state=self._state()))
        session.connected(channel, _bytes(await connection.recv()))
        old, self._live = self._live, connection
        self._session, self._validator = session, begin.validator
        self.last_frame = time.monotonic()
        if old is not None and old is not connection:
            self._spawn(old.close(_REPLACED, "replaced by a newer connection"))
        for frame in session.unacknowledged():
            self._outgoing.put_nowait((connection, frame))
        return session

    async def _converse(self, connection: ServerConnection, session: ChallengeSession) -> None:
        try:
            async for frame in connection:
                if self._live is not connection:
                    return
                message = session.receive(_bytes(frame))
                self.last_frame = time.monotonic()
                self._take(message)
        except (FrameInvalid, MessageInvalid, HandshakeInvalid) as error:
            await connection.close(_FRAME_INVALID, str(error)[:100])
        except ConnectionClosed:
            pass
        finally:
            if self._live is connection:
                self._live = None
                session.disconnected()

    def _take(self, message: ValidatorMessage) -> None:
        if isinstance(message, Ping):
            self._send(Pong(n=message.n))
        elif isinstance(message, Configure):
            self._configure(message)
        elif isinstance(message, JobExecute):
            self._execute(message)
        elif isinstance(message, SubmissionChunk):
            if self._job is not None and self._job.order.job_id == message.job_id:
                self._job.chunk(message)
        elif isinstance(message, JobCancel):
            self._cancel(message)
        elif isinstance(message, ValuesResult):
            if self._values is not None:
                self._values.answered(message)
        elif isinstance(message, WeightsRequest):
            self._spawn(self._answer_weights(message))

    def _configure(self, message: Configure) -> None:
        if self._challenge_id is not None:
            return
        self._challenge_id = message.challenge_id
        os.environ.update(message.env)
        self._values = Values(self._send)
        self._spawn(self._start_up())

    async def _start_up(self) -> None:
        try:
            await self.challenge.call("startup")
            await self.challenge.call("ready")
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises makes the challenge fail
            self.health.status, self.health.error = "failed", f"on_startup: {type(error).__name__}: {error}"
            self._send(GuestError(code="startup_failed", message=self.health.error[:8000]))
            return
        self._send(Ready(handlers=self.challenge.handlers))

    def _execute(self, order: JobExecute) -> None:
        if self._job is not None and self._job.order.job_id == order.job_id:
            return
        validator = self._validator
        if validator is None:
            return
        busy = self._job is not None and (self.per_job or self._job.phase != "done")
        if busy or self._values is None:
            why = "this VM has its one job" if busy else "not configured"
            self._send(GuestError(code="busy" if busy else "not_configured", message=why))
            return
        self._job = JobRun(
            order,
            challenge=self.challenge,
            agent=self.agent,
            validator=validator,
            values=self._values,
            send=self._send,
            max_result=self.max_result,
            scratch=self.scratch,
        )
        self._job_task = self._spawn(self._job.run())

    def _cancel(self, message: JobCancel) -> None:
        if self._job is None or self._job.order.job_id != message.job_id or self._job_task is None:
            return
        if self._job_task.cancel():
            self._job.phase = "done"
            error = JobError(code="cancelled", message=message.reason[:1000])
            self._send(JobResult(job_id=message.job_id, error=error))

    async def _answer_weights(self, message: WeightsRequest) -> None:
        try:
            weights = await self.challenge.weights(message.results)
            self._send(WeightsResponse(request_id=message.request_id, weights=weights))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is the answer
            told = JobError(code="weights_failed", message=f"{type(error).__name__}: {error}"[:4000])
            self._send(WeightsResponse(request_id=message.request_id, error=told))

    def _state(self) -> GuestState:
        job = self._job
        return GuestState(
            configured=self._challenge_id is not None,
            job_id=None if job is None else job.order.job_id,
            job="none" if job is None else job.phase,
            submission_bytes=0 if job is None else job.received,
        )

    def _send(self, message: GuestMessage) -> None:
        """Send, from the loop or from a handler's thread."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            self._send_here(message)
        else:
            self._loop.call_soon_threadsafe(self._send_here, message)

    def _send_here(self, message: GuestMessage) -> None:
        if self._session is None:
            return
        frame = self._session.send(message)
        if frame is not None and self._live is not None:
            self._outgoing.put_nowait((self._live, frame))

    async def _send_all(self) -> None:
        while True:
            connection, frame = await self._outgoing.get()
            with contextlib.suppress(ConnectionClosed):
                await connection.send(frame)

    def _spawn(self, work: object) -> asyncio.Task[None]:
        if self._tasks is None:
            raise RuntimeError("the server is not running")
        return self._tasks.create_task(work)  # type: ignore[arg-type]  # a coroutine of any of our methods


def _text(frame: str | bytes) -> str:
    if isinstance(frame, bytes):
        raise HandshakeInvalid("expected a text frame")
    return frame


def _bytes(frame: str | bytes) -> bytes:
    if isinstance(frame, str):
        raise MessageInvalid("expected a binary frame")
    return frame


def run() -> None:
    """Serve the process's challenge: for a challenge started as a program inside its CVM.

    With `platform-boot`, which imports the challenge itself, this does nothing and is not needed.
    """
    from platform_challenge_sdk.boot import booting, serve_challenge  # noqa: PLC0415 - boot imports this module

    if booting():
        return
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(serve_challenge(the_challenge)))


def end_on_signals(stop: asyncio.Event) -> None:
    """SIGTERM and SIGINT end the server in an orderly way."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
