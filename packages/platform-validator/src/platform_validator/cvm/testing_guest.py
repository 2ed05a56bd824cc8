"""A guest that runs in this process: health and sessions of the real protocol over loopback, work by script.

What the validator's tests boot instead of a sandbox. Everything that crosses the wire is the real thing:
handshake, sealed frames, resume; only what a challenge would do is a coroutine function.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from platform_protocol.ids import ChallengeId, JobId, VmName
from platform_protocol.session.channel import SealedChannel
from platform_protocol.session.ends import ChallengeSession
from platform_protocol.session.errors import AuthRefused, SessionError
from platform_protocol.session.messages import (
    Configure,
    GuestError,
    GuestMessage,
    GuestState,
    JobCancel,
    JobError,
    JobExecute,
    JobProgress,
    JobResult,
    Ping,
    Pong,
    Ready,
    SubmissionChunk,
    ValidatorMessage,
    ValuesRequest,
    ValuesResult,
    WeightsRequest,
    WeightsResponse,
)
from platform_protocol.session.v2 import Begin, ChallengeHandshake
from platform_protocol.user_config import UserConfig

Outcome = dict[str, Any] | JobError
Work = Callable[["ScriptedGuest", JobExecute, bytes], Awaitable[Outcome]]
Quote = Callable[[bytes], tuple[bytes | None, str]]
"""Report data (64 bytes) to (quote or None, event log)."""
_MAX_FRAME = 64 * 1024 * 1024
_AUTH_REFUSED, _INVALID, _REPLACED = 4403, 4400, 4409


async def echo(_guest: ScriptedGuest, order: JobExecute, submission: bytes) -> Outcome:
    """Answer with the payload and the submission's size."""
    return {"score": 1.0, "payload": order.payload, "submission_bytes": len(submission)}


def without_quote(_report_data: bytes) -> tuple[bytes | None, str]:
    """A VM that can make none."""
    return None, ""


@dataclass(slots=True)
class GuestScript:
    """What a guest does.

    Args:
        work: What becomes of a job.
        quote: What it shows in a handshake.
        status: What health says: `ready`, `starting` or `failed`, with `error`.
        startup_error: Told instead of `ready` after `configure`.
        says_name: The VM name that it claims; None: its own.
        answers_pings: Off: it has gone silent.
        weights: The answer to `weights_request`.
    """

    work: Work = echo
    quote: Quote = without_quote
    status: str = "ready"
    error: str | None = None
    startup_error: str | None = None
    says_name: VmName | None = None
    answers_pings: bool = True
    weights: dict[str, float] = field(default_factory=dict)


class ScriptedGuest:
    """One boot of one VM. `serve` runs it; the rest looks at it and disturbs it.

    Attributes:
        configured: Every `configure` that came.
        orders: Every `job_execute`, repeated ones too.
        cancelled: Every `job_cancel`.
        connections: How many handshakes came to their end.
    """

    def __init__(self, config: UserConfig, script: GuestScript) -> None:
        self.config = config
        self.script = script
        self.configured: list[Configure] = []
        self.orders: list[JobExecute] = []
        self.cancelled: list[JobCancel] = []
        self.connections = 0
        self.changed = asyncio.Condition()
        self._seen: set[bytes] = set()
        self._session: ChallengeSession | None = None
        self._live: ServerConnection | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._data = bytearray()
        self._received = asyncio.Event()
        self._phase = "none"
        self._job: JobId | None = None
        self._asked: dict[str, asyncio.Future[ValuesResult]] = {}

    async def serve(self, host: str, port: int) -> None:
        """Serve until cancelled.

        Raises:
            OSError: The port is in use.
        """
        # A socket of our own: one that `serve` makes stays open when we are cancelled while it begins.
        with socket.create_server((host, port)) as listener:
            await self._serve_on(listener)

    async def _serve_on(self, listener: socket.socket) -> None:
        async with (
            serve(
                self._connected,
                sock=listener,
                process_request=self._process_request,
                max_size=_MAX_FRAME,
                compression=None,
                ping_interval=None,
                close_timeout=0.1,
            ),
            asyncio.TaskGroup() as tasks,
        ):
            self._tasks = tasks
            await asyncio.Event().wait()

    async def until(self, condition: Callable[[ScriptedGuest], bool]) -> None:
        """Wait until something holds of this guest."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: condition(self))

    def drop(self) -> None:
        """Break the live connection, as a network would."""
        if self._live is not None:
            self._live.transport.abort()

    def reboot(self) -> None:
        """Forget the session and the job; the secret stays, as user_config does."""
        self._session, self._job, self._phase = None, None, "none"
        self.drop()

    async def ask(self, request: ValuesRequest) -> ValuesResult:
        """Send a values request and wait for its answer, over any number of connections."""
        answer = self._asked.setdefault(request.request_id, asyncio.get_running_loop().create_future())
        await self.say(request)
        return await answer

    async def say(self, message: GuestMessage) -> None:
        """Send a message, or keep it for the resume."""
        session, live = self._session, self._live
        if session is None:
            return
        frame = session.send(message)
        if frame is not None and live is not None:
            with contextlib.suppress(ConnectionClosed):
                await live.send(frame)

    # Connections

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/sdk/ws":
            return None
        health = {"status": self.script.status}
        if self.script.error is not None:
            health["error"] = self.script.error
        return connection.respond(HTTPStatus.OK, json.dumps(health))

    async def _connected(self, connection: ServerConnection) -> None:
        try:
            session = await self._greet(connection)
            async for frame in connection:
                await self._take(session.receive(_bytes(frame)))
        except AuthRefused as error:
            await connection.close(_AUTH_REFUSED, str(error)[:100])
        except SessionError as error:
            await connection.close(_INVALID, str(error)[:100])
        except ConnectionClosed:
            pass
        finally:
            if self._live is connection:
                self._live = None
                if self._session is not None:
                    self._session.disconnected()
            await self._tell()

    async def _greet(self, connection: ServerConnection) -> ChallengeSession:
        name = self.script.says_name or self.config.vm
        handshake = ChallengeHandshake(
            launch_secret=self.config.secret, vm=VmName(name), seen_nonces=self._seen
        )
        begin = handshake.receive_begin(str(await connection.recv()))
        quote, event_log = self.script.quote(begin.report_data)
        await connection.send(handshake.respond(quote, event_log, ""))
        channel = handshake.receive_verdict(str(await connection.recv()))
        return await self._resume(connection, channel, begin)

    async def _resume(
        self, connection: ServerConnection, channel: SealedChannel, begin: Begin
    ) -> ChallengeSession:
        held = self._session
        known = held is not None and held.session_id == begin.session_id
        session = held if known and held is not None else ChallengeSession(begin.session_id)
        await connection.send(session.greet(channel, known=known, state=self._state()))
        session.connected(channel, _bytes(await connection.recv()))
        old, self._live, self._session = self._live, connection, session
        if old is not None:
            await old.close(_REPLACED)
        self.connections += 1
        for frame in session.unacknowledged():
            await connection.send(frame)
        await self._tell()
        return session

    # Messages

    async def _take(self, message: ValidatorMessage) -> None:
        match message:
            case Configure():
                self.configured.append(message)
                await self._start_up()
            case JobExecute():
                self.orders.append(message)
                self._begin(message)
            case SubmissionChunk():
                self._chunk(message)
            case JobCancel():
                self.cancelled.append(message)
            case ValuesResult():
                answer = self._asked.get(message.request_id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Ping() if self.script.answers_pings:
                await self.say(Pong(n=message.n))
            case WeightsRequest():
                await self.say(WeightsResponse(request_id=message.request_id, weights=self.script.weights))
            case _:
                pass
        await self._tell()

    async def _start_up(self) -> None:
        if self.script.startup_error is not None:
            await self.say(GuestError(code="startup_failed", message=self.script.startup_error))
        else:
            await self.say(Ready(handlers=["default"]))

    def _begin(self, order: JobExecute) -> None:
        if self._job == order.job_id or self._tasks is None:
            return
        self._job = order.job_id
        self._data.clear()
        self._received.clear()
        self._phase = "receiving" if order.submission_sha256 is not None else "running"
        work = self._do(order)
        try:
            self._tasks.create_task(work)
        except RuntimeError:
            # Switched off at this moment: what it was told goes with it.
            work.close()

    def _chunk(self, chunk: SubmissionChunk) -> None:
        if self._phase == "receiving" and chunk.offset == len(self._data):
            self._data += chunk.data
            if chunk.last:
                self._received.set()

    async def _do(self, order: JobExecute) -> None:
        if order.submission_sha256 is not None:
            await self._received.wait()
        self._phase = "running"
        await self.say(JobProgress(job_id=order.job_id, percent=0, message="running"))
        outcome = await self.script.work(self, order, bytes(self._data))
        self._phase = "done"
        if isinstance(outcome, JobError):
            await self.say(JobResult(job_id=order.job_id, error=outcome))
        else:
            await self.say(JobResult(job_id=order.job_id, result=outcome))

    def _state(self) -> GuestState:
        return GuestState.model_validate(
            {
                "configured": bool(self.configured) and self._session is not None,
                "job_id": self._job,
                "job": self._phase,
                "submission_bytes": len(self._data),
            }
        )

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    @property
    def pending(self) -> int:
        """How many numbered messages the validator has not acknowledged."""
        return 0 if self._session is None else self._session.pending

    @property
    def challenge_id(self) -> ChallengeId | None:
        """What it was configured for."""
        return self.configured[0].challenge_id if self.configured else None


def _bytes(frame: str | bytes) -> bytes:
    if isinstance(frame, str):
        raise SessionError("expected a binary frame")
    return frame
