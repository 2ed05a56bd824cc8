"""A small validator over loopback: the other end of a session, for tests of challenges and of the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import uuid
from collections.abc import AsyncIterator
from typing import TypeVar

from websockets.asyncio.client import ClientConnection, connect

from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmName
from platform_protocol.session.channel import SealedChannel
from platform_protocol.session.ends import ValidatorSession
from platform_protocol.session.errors import MessageInvalid
from platform_protocol.session.messages import (
    CHUNK_BYTES,
    Configure,
    GuestHello,
    GuestMessage,
    JobExecute,
    Ready,
    SubmissionChunk,
    ValidatorMessage,
)
from platform_protocol.session.v2 import Offer, ValidatorHandshake

_DEADLINE = 20.0
HOTKEY = Hotkey("5C4hrfjw9DjXZTzV3MwzrrAr9P1MJhSrvWGWqi1eSuyUpnhM")
CHALLENGE = ChallengeId("3f0c6a52-6c1c-4d6e-9a57-0d9f3c1b2a44")
M = TypeVar("M", bound=GuestMessage)


class TestingValidator:
    """One session, over any number of connections. It takes every offer; `offer` is the last one."""

    __test__ = False

    def __init__(self, port: int, *, launch_secret: bytes, vm: VmName) -> None:
        self.session_id = str(uuid.uuid4())
        self.end = ValidatorSession(self.session_id)
        self.offer: Offer | None = None
        self.seen: list[GuestMessage] = []
        """Messages that `expect` passed over."""
        self._port = port
        self._secret = launch_secret
        self._vm = vm
        self._socket: ClientConnection | None = None

    @property
    def socket(self) -> ClientConnection:
        """The live connection."""
        if self._socket is None:
            raise MessageInvalid("not connected")
        return self._socket

    async def dial(self) -> ClientConnection:
        """A bare connection to the SDK."""
        return await connect(
            f"ws://127.0.0.1:{self._port}/sdk/ws", ping_interval=None, compression=None, max_size=None
        )

    async def connect(self, *, resume: bool = False) -> GuestHello:
        """Dial, shake hands and greet; the SDK's hello."""
        async with asyncio.timeout(_DEADLINE):
            socket = await self.dial()
            hello = await self.greet(socket, resume=resume)
            self._socket = socket
            return hello

    async def greet(self, socket: ClientConnection, *, resume: bool) -> GuestHello:
        """The handshake, and hello both ways."""
        handshake = ValidatorHandshake(
            launch_secret=self._secret,
            vm=self._vm,
            validator=HOTKEY,
            session_id=self.session_id,
            resume=resume,
        )
        await socket.send(handshake.begin())
        self.offer = handshake.receive(str(await socket.recv()))
        accepted, channel = handshake.accept()
        if not isinstance(channel, SealedChannel):
            raise MessageInvalid("expected session version 2")
        await socket.send(accepted)
        self.end.connected(channel)
        hello = self.end.receive(bytes(await socket.recv(decode=False)))
        if not isinstance(hello, GuestHello):
            raise MessageInvalid("expected hello first")
        await socket.send(self.end.hello())
        return hello

    async def start(self, env: dict[str, str] | None = None) -> Ready:
        """Connect, configure, and wait for `ready`, which is acknowledged."""
        await self.connect()
        await self.send(Configure(env=env or {}, challenge_id=CHALLENGE))
        ready = await self.expect(Ready)
        await self.done(ready.seq)
        return ready

    async def send(self, message: ValidatorMessage) -> None:
        """Send one message."""
        await self.socket.send(self.end.send(message))

    async def execute(
        self,
        submission: bytes | None = None,
        *,
        name: str | None = None,
        payload: object = None,
        attempt: int = 1,
    ) -> JobId:
        """Order a job, with its submission in chunks."""
        job_id = JobId(str(uuid.uuid4()))
        digest = None if submission is None else hashlib.sha256(submission).hexdigest()
        await self.send(
            JobExecute(
                job_id=job_id,
                attempt=attempt,
                challenge_id=CHALLENGE,
                job_name=name,
                payload=payload if isinstance(payload, dict) else {},
                submission_sha256=digest,
            )
        )
        if submission is not None:
            await self.upload(job_id, submission)
        return job_id

    async def upload(self, job_id: JobId, data: bytes, offset: int = 0) -> None:
        """The submission from an offset on."""
        while True:
            part = data[offset : offset + CHUNK_BYTES]
            last = offset + len(part) == len(data)
            await self.send(SubmissionChunk(job_id=job_id, offset=offset, last=last, data=part))
            offset += len(part)
            if last:
                return

    async def expect(self, kind: type[M]) -> M:
        """The next message of a kind; others go to `seen`."""
        async with asyncio.timeout(_DEADLINE):
            async for message in self._messages():
                if isinstance(message, kind):
                    return message
                self.seen.append(message)
        raise MessageInvalid(f"the connection closed before a {kind.__name__}")

    async def _messages(self) -> AsyncIterator[GuestMessage]:
        while True:
            message = self.end.receive(bytes(await self.socket.recv(decode=False)))
            if message is not None:
                yield message

    async def done(self, seq: int) -> None:
        """The effect of a message is durable."""
        frame = self.end.done(seq)
        if frame is not None:
            await self.socket.send(frame)

    async def drop(self) -> None:
        """Break the connection without a word, as a network does."""
        socket, self._socket = self.socket, None
        socket.transport.abort()
        await socket.wait_closed()
        self.end.disconnected()

    async def close(self) -> None:
        """Close the connection, if there is one."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                await self._socket.close()
