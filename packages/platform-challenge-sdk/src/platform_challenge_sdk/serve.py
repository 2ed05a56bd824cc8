"""Serves a challenge on port 10000: health over HTTP, sessions over WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as serve_websocket
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.held_jobs import HeldJobs
from platform_challenge_sdk.job import JobRun
from platform_challenge_sdk.lifetime import LastResort, Lifetime
from platform_challenge_sdk.means import Means, read_egress
from platform_challenge_sdk.outgoing import Outgoing
from platform_challenge_sdk.values import Values
from platform_challenge_sdk.wire_text import wire_text
from platform_protocol.canonical import canonical_json
from platform_protocol.ids import ChallengeId, Hotkey, VmName
from platform_protocol.session.channel import MAX_FRAME, SealedChannel
from platform_protocol.session.ends import ChallengeSession
from platform_protocol.session.errors import AuthRefused, HandshakeInvalid, MessageInvalid, SessionError
from platform_protocol.session.frame_limit import take_messages_of
from platform_protocol.session.messages import (
    Configure,
    GuestError,
    GuestMessage,
    JobCancel,
    JobError,
    JobExecute,
    JobProgress,
    JobResult,
    Log,
    Ping,
    Pong,
    Ready,
    SubmissionChunk,
    ValidatorMessage,
    ValuesResult,
    WeightsRequest,
    WeightsResponse,
    encode_message,
)
from platform_protocol.session.v2 import MAX_BEGIN, Begin, ChallengeHandshake
from platform_protocol.user_config import UserConfig

PORT = 10000
_HANDSHAKE = 10.0
_IDLE = 150.0
_MAX_RESULT = 48 * 1024 * 1024
_CLEANUP = 10.0
_TICK = 5.0
_MAX_UNREAD = 4
_MAX_MESSAGE = MAX_FRAME - 1024
_AUTH_REFUSED, _HANDSHAKE_INVALID, _FRAME_INVALID, _BUSY, _REPLACED = 4403, 4400, 4401, 1013, 4409
_SILENT = 4408
_MAX_ERROR = 4000
_MAX_ID = 64


def _boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class ChallengeServer:
    """One challenge, one validator, one live connection.

    `config` None: what it should say could not be read, and only health is served. `jobs`: what it holds, and
    how many it may hold. `memory`: bytes of the CVM as its challenge declares them. `clock`: seconds, counted
    while the machine sleeps too. `handshake`: seconds of one.
    `idle`: seconds without a frame after which a connection is dead: validators ping every 30.
    """

    challenge: Challenge
    config: UserConfig | None
    health: Health
    agent: Agent = field(default_factory=Agent)
    max_result: int = 1024 * 1024
    memory: int | None = None
    jobs: HeldJobs = field(default_factory=HeldJobs)
    scratch: Path = Path(tempfile.gettempdir())
    clock: Callable[[], float] = _boottime
    handshake: float = _HANDSHAKE
    idle: float = _IDLE
    _seen: set[bytes] = field(default_factory=set)
    _session: ChallengeSession | None = None
    _live: ServerConnection | None = None
    _handshaking: bool = False
    _validator: Hotkey | None = None
    _values: Values | None = None
    _challenge_id: ChallengeId | None = None
    _started_up: bool = False
    _tasks: asyncio.TaskGroup | None = None
    _outgoing: Outgoing = field(default_factory=Outgoing)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _last_frame: float = 0.0
    _lifetime: Lifetime | None = None

    async def serve(self, host: str = "0.0.0.0", port: int = PORT, stop: asyncio.Event | None = None) -> str:
        """Serve until `stop` is set or the lifetime is over. Why it ended."""
        stop = stop or asyncio.Event()
        self._last_frame = now = self.clock()
        if self.config is not None:
            self._lifetime = Lifetime(
                now, float(self.config.max_lifetime_s), float(self.config.hard_lifetime_s)
            )
        last_resort = LastResort(self._left)
        try:
            async with self.listen(host, port), asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                sender = tasks.create_task(self._outgoing.run())
                why = await self._watch(stop)
                sender.cancel()
                self.jobs.end()
                with contextlib.suppress(Exception, SystemExit):
                    async with asyncio.timeout(_CLEANUP):
                        await self.challenge.call("cleanup")
        finally:
            last_resort.stop()
        return why

    def listen(self, host: str, port: int) -> contextlib.AbstractAsyncContextManager[Server]:
        """The listening server (websockets' own context manager)."""
        return serve_websocket(
            self._connected,
            host,
            port,
            process_request=self._process_request,
            open_timeout=self.handshake,
            max_size=MAX_BEGIN,
            max_queue=_MAX_UNREAD,
            compression=None,
            ping_interval=None,
            close_timeout=2,
        )

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/sdk/ws":
            if self.health.status == "ready" and self.config is not None:
                return None
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "not ready\n")
        if request.path == "/sdk/health":
            response = connection.respond(HTTPStatus.OK, self.health.body())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
            return response
        return connection.respond(HTTPStatus.NOT_FOUND, "not found\n")

    def _left(self) -> tuple[float, str]:
        """Seconds of life, and why it ends then; without a user_config the boot deadline ends it."""
        if self._lifetime is None:
            return math.inf, ""
        return self._lifetime.left(
            last_frame=self._last_frame, holds_job=self.jobs.in_charge, now=self.clock()
        )

    async def _watch(self, stop: asyncio.Event) -> str:
        while not stop.is_set():
            left, why = self._left()
            if left <= 0:
                return why
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_TICK, left)):
                    await stop.wait()
        return "stopped"

    async def _connected(self, connection: ServerConnection) -> None:
        if self._handshaking:
            await connection.close(_BUSY, "another handshake is pending")
            return
        self._handshaking = True
        try:
            begun = await self._try_handshake(connection)
        finally:
            # Its place is free before it is closed, which who dialled may draw out.
            self._handshaking = False
        if isinstance(begun, ChallengeSession):
            await self._converse(connection, begun)
        elif begun is not None:
            await connection.close(begun[0], begun[1][:100])

    async def _try_handshake(self, connection: ServerConnection) -> ChallengeSession | tuple[int, str] | None:
        """The session, or code and reason to close the connection with; None: it is closed."""
        try:
            async with asyncio.timeout(self.handshake):
                return await self._handshake(connection)
        except AuthRefused as error:
            return _AUTH_REFUSED, str(error)
        except (SessionError, TimeoutError) as error:
            return _HANDSHAKE_INVALID, str(error) or "handshake timed out"
        except ConnectionClosed:
            return None

    async def _handshake(self, connection: ServerConnection) -> ChallengeSession:
        if self.config is None:
            raise HandshakeInvalid("this VM has no user_config")
        handshake = ChallengeHandshake(
            launch_secret=self.config.secret, vm=VmName(self.config.vm), seen_nonces=self._seen
        )
        begin = handshake.receive_begin(_text(await connection.recv()))
        quote = await self.agent.quote(begin.report_data)
        await connection.send(handshake.respond(quote.quote, quote.event_log, quote.vm_config))
        channel = handshake.receive_verdict(_text(await connection.recv()))
        # It knows the launch secret, and sends nothing more before our hello; then frames may be large.
        take_messages_of(connection, MAX_FRAME)
        return await self._greet(connection, channel, begin)

    async def _greet(
        self, connection: ServerConnection, channel: SealedChannel, begin: Begin
    ) -> ChallengeSession:
        known = self._session is not None and self._session.session_id == begin.session_id
        session = self._session if known and self._session else ChallengeSession(begin.session_id)
        state = self.jobs.state(configured=self._challenge_id is not None)
        await connection.send(session.greet(channel, known=known, state=state))
        session.connected(channel, _bytes(await connection.recv()))
        old, self._live = self._live, connection
        self._session, self._validator = session, begin.validator
        self._last_frame = self.clock()
        if old is not None:
            self._spawn(old.close(_REPLACED, "replaced by a newer connection"))
        for frame in session.unacknowledged():
            self._outgoing.put(connection, frame)
        self._repeat(known=known)
        return session

    def _repeat(self, *, known: bool) -> None:
        """What the other side may have acknowledged without telling us more, or never heard of."""
        for request in self._values.unanswered() if self._values is not None else ():
            self._send_here(request)
        if known:
            return
        if self._started_up:
            self._send_here(Ready(handlers=self.challenge.handlers))
        for result in self.jobs.results():
            self._send_here(result)

    async def _converse(self, connection: ServerConnection, session: ChallengeSession) -> None:
        try:
            while True:
                async with asyncio.timeout(self.idle):
                    frame = await connection.recv()
                if self._live is not connection:
                    return
                message = session.receive(_bytes(frame))
                self._last_frame = self.clock()
                self._take(message)
        except SessionError as error:
            await connection.close(_FRAME_INVALID, str(error)[:100])
        except TimeoutError:
            await connection.close(_SILENT, "nothing was heard")
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
            self.jobs.chunk(message)
        elif isinstance(message, JobCancel):
            self.jobs.cancel(message)
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
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises makes the challenge fail
            why = wire_text(f"{type(error).__name__}: {error}", _MAX_ERROR)
            self.health.status, self.health.error = "failed", f"on_startup or on_ready: {why}"
            self._send(GuestError(code="startup_failed", message=self.health.error))
            return
        self._started_up = True
        self._send(Ready(handlers=self.challenge.handlers))

    def _execute(self, order: JobExecute) -> None:
        if self.jobs.knows(order):
            return
        if self._validator is None or self._values is None or not self._started_up:
            self._refuse(order, "not_ready", "a job before configure and ready")
        elif self.jobs.busy or self.jobs.outruns(order):
            self._refuse(order, "busy", "this VM has its job, or as many as it runs at once")
        elif order.challenge_id != self._challenge_id:
            self._refuse(order, "wrong_challenge", f"this VM runs {self._challenge_id}")
        else:
            run = JobRun(
                order,
                challenge=self.challenge,
                agent=self.agent,
                validator=self._validator,
                values=self._values,
                send=self._send,
                max_result=min(self.max_result, _MAX_RESULT),
                scratch=self.scratch,
                means=self._means(),
            )
            self.jobs.begin(run, self._spawn)

    def _means(self) -> Means:
        at_once = 1 if self.jobs.per_job else self.jobs.concurrency
        if self.config is None:
            return Means(self.memory, jobs=at_once)
        egress = read_egress(self.config.proxy_url, self.config.validator_base_url)
        return Means(self.memory, egress, at_once)

    def _refuse(self, order: JobExecute, code: str, message: str) -> None:
        self._send(GuestError(code=code, message=message, request_id=order.job_id[:_MAX_ID]))

    async def _answer_weights(self, message: WeightsRequest) -> None:
        try:
            weights = await self.challenge.weights(message.results)
            canonical_json(weights)
            self._send(WeightsResponse(request_id=message.request_id, weights=weights))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises is the answer
            told = wire_text(f"{type(error).__name__}: {error}", _MAX_ERROR)
            refused = JobError(code="weights_failed", message=told)
            self._send(WeightsResponse(request_id=message.request_id, error=refused))

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
        session, live = self._session, self._live
        if session is None:
            return
        loose = isinstance(message, (Log, JobProgress))
        if loose and (live is None or self._outgoing.full):
            self._outgoing.lose()
            return
        if live is not None and isinstance(message, (Log, JobProgress, JobResult)):
            gap = self._outgoing.gap(message.job_id)
            if gap is not None and (told := session.send(gap)) is not None:
                self._outgoing.put(live, told, loose=True)
        if isinstance(message, JobResult) and len(encode_message(message)) > _MAX_MESSAGE:
            error = JobError(code="result_too_large", message="the result and its evidence are no frame")
            message = JobResult(job_id=message.job_id, attempt=message.attempt, error=error)
        frame = session.send(message)
        if frame is not None and live is not None:
            self._outgoing.put(live, frame, loose=loose)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if self._tasks is None:
            raise RuntimeError("the server is not running")
        return self._tasks.create_task(work)


def _text(frame: str | bytes) -> str:
    if isinstance(frame, bytes):
        raise HandshakeInvalid("expected a text frame")
    return frame


def _bytes(frame: str | bytes) -> bytes:
    if isinstance(frame, str):
        raise MessageInvalid("expected a binary frame")
    return frame
