"""A session's sealed connection of the moment, or none: greets, sends, acknowledges, reads, pings.

What cannot be sent is lost here; whoever sends makes up for it after the resume.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import NamedTuple

import structlog
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import WebSocketException

from platform_protocol.ids import VmName
from platform_protocol.session.channel import MAX_FRAME, MAX_FRAMES, SealedChannel
from platform_protocol.session.ends import ValidatorSession
from platform_protocol.session.errors import SessionError
from platform_protocol.session.frame_limit import take_messages_of
from platform_protocol.session.messages import (
    GuestHello,
    GuestMessage,
    JobResult,
    Ping,
    ValidatorMessage,
    guest_message,
)
from platform_validator.cvm.connection import SessionPace, abandon, bytes_of
from platform_validator.cvm.reading import read_message

_UNANSWERED = 3
_REKEY_FRAMES = MAX_FRAMES // 2
"""Frames in one direction after which a connection is made anew, with new keys."""

_log = structlog.get_logger(__name__)


class Heard(NamedTuple):
    """A message, and the length of a large `job_result` of which only the used part is here."""

    message: GuestMessage
    result_bytes: int | None


class SessionLink:
    """V's end of one session, with the connection that it has now.

    Args:
        session_id: Journaled with the VM.
        vm: For the log.
        pace: How long things may take.
    """

    def __init__(self, session_id: str, vm: VmName, pace: SessionPace) -> None:
        self._end = ValidatorSession(session_id)
        self._vm = vm
        self._pace = pace
        self._socket: ClientConnection | None = None
        self._channel: SealedChannel | None = None
        self._unanswered = 0
        self._pong = asyncio.Event()
        self._due: list[int] = []

    @property
    def session_id(self) -> str:
        """The session's id."""
        return self._end.session_id

    @property
    def socket(self) -> ClientConnection | None:
        """The connection in use."""
        return self._socket

    async def greet(self, socket: ClientConnection, channel: SealedChannel) -> GuestHello:
        """Exchange hellos over a new connection; it is abandoned where that fails.

        Raises:
            SessionError, WebSocketException, TimeoutError: It did not say hello.
        """
        try:
            async with asyncio.timeout(self._pace.dial):
                self._end.connected(channel)
                self._channel = channel
                hello = self._end.receive(bytes_of(await socket.recv()))
                if not isinstance(hello, GuestHello):
                    raise SessionError("expected the SDK's hello first")
                # The guest sends nothing more before it has this, and whatever it likes at once after it.
                take_messages_of(socket, MAX_FRAME)
                await socket.send(self._end.hello())
                return hello
        except BaseException:
            self._end.disconnected()
            await abandon(socket)
            raise

    def up(self, socket: ClientConnection) -> None:
        """This connection is the one in use."""
        self._socket, self._unanswered = socket, 0

    async def down(self, socket: ClientConnection) -> None:
        """It is gone."""
        self._socket = None
        self._end.disconnected()
        await abandon(socket)

    def cut(self) -> None:
        """Break the connection, if there is one."""
        if self._socket is not None:
            self._socket.transport.abort()

    async def read(self, frame: str | bytes) -> Heard | None:
        """The message in a frame; None for one that came before.

        Raises:
            FrameInvalid: It does not open.
            MessageInvalid: It cannot be read, or is not what comes next.
            SessionError: No binary frame.
        """
        read = await read_message(self._end.open(bytes_of(frame)))
        message = self._end.accept(guest_message(read.value))
        if message is None:
            return None
        return Heard(message, read.result_bytes if isinstance(message, JobResult) else None)

    async def send(self, message: ValidatorMessage) -> None:
        """Send if there is a greeted connection."""
        if self._socket is not None and self._end.greeted:
            await self._send_frame(self._end.send(message))

    async def acknowledge(self, seq: int) -> None:
        """Its effect is durable. Without a connection it waits: a frame that is not sent costs a number."""
        if self._socket is None:
            self._due.append(seq)
            return
        await self._send_frame(self._end.done(seq))

    async def acknowledge_due(self) -> None:
        """Acknowledge what waited for a connection."""
        due, self._due = self._due, []
        for seq in due:
            await self.acknowledge(seq)

    async def keep_alive(self, socket: ClientConnection) -> None:
        """Ping until cancelled; cut a connection that does not answer, and one whose keys are used up."""
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
            await self.send(Ping(n=number))

    def ponged(self) -> None:
        """The SDK answered a ping."""
        self._unanswered = 0
        self._pong.set()

    async def answered(self) -> None:
        """Return once it answers a ping that is sent from now on."""
        self._pong.clear()
        while not self._pong.is_set():
            await self.send(Ping(n=0))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.retry_most):
                    await self._pong.wait()

    async def _send_frame(self, frame: bytes | None) -> None:
        socket = self._socket
        if frame is None or socket is None:
            return
        try:
            async with asyncio.timeout(self._pace.send):
                await socket.send(frame)
        except (WebSocketException, TimeoutError, OSError):
            socket.transport.abort()
