"""The VMM's end of the control socket to a stage: messages with file descriptors, on the event loop."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections import deque
from typing import Any

from platform_vmm.errors import SandboxFailed

_MAX_MESSAGE = 65536
_MAX_DESCRIPTORS = 32


class Control:
    """Owns the socket and its reader. `started` and `exited` are what the stage tells us."""

    def __init__(self, endpoint: socket.socket) -> None:
        self._socket = endpoint
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[asyncio.Future[socket.socket]] = deque()
        self.started: asyncio.Future[tuple[dict[str, Any], list[socket.socket]]] = self._loop.create_future()
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        endpoint.setblocking(False)
        self._loop.add_reader(endpoint, self._readable)

    def send(self, message: bytes, descriptors: list[int] | None = None) -> None:
        """Send one message.

        Raises:
            SandboxFailed: The stage is gone.
        """
        try:
            if descriptors:
                socket.send_fds(self._socket, [message], descriptors)
            else:
                self._socket.send(message)
        except OSError as error:
            raise SandboxFailed(f"the sandbox's stage is gone: {error}") from error

    async def connect(self, address: tuple[str, int], timeout: float = 5.0) -> socket.socket:
        """A socket of the sandbox's network namespace, connected to an address in there.

        Raises:
            SandboxFailed: The stage is gone.
            OSError: Nobody listens there.
            TimeoutError: Nobody answers.
        """
        answer: asyncio.Future[socket.socket] = self._loop.create_future()
        self.send(b"S")
        self._waiting.append(answer)
        async with asyncio.timeout(timeout):
            fresh = await answer
            try:
                await self._loop.sock_connect(fresh, address)
            except BaseException:
                fresh.close()
                raise
        return fresh

    def close(self) -> None:
        """Hang up: the stage kills and reaps everything below it. Safe to call twice."""
        if self._socket.fileno() < 0:
            return
        self._loop.remove_reader(self._socket)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._gone("hung up")

    def _readable(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._socket, _MAX_MESSAGE, _MAX_DESCRIPTORS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            message, descriptors = b"", []
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for one in sockets:
            one.setblocking(False)
        if not message:
            self._loop.remove_reader(self._socket)
            self._gone("it died")
            return
        self._told(json.loads(message), sockets)

    def _told(self, message: dict[str, Any], sockets: list[socket.socket]) -> None:
        if "socket" in message:
            answer = self._waiting.popleft()
            if answer.done():
                sockets[0].close()
            else:
                answer.set_result(sockets[0])
        elif "pid" in message and not self.started.done():
            self.started.set_result((message, sockets))
        elif "exit" in message and not self.exited.done():
            self.exited.set_result(int(message["exit"]))
        elif "failed" in message and not self.started.done():
            self.started.set_exception(SandboxFailed(f"the sandbox could not be made: {message['failed']}"))

    def _gone(self, why: str) -> None:
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(SandboxFailed(f"the sandbox's stage is gone: {why}"))
        self._waiting.clear()
        if not self.started.done():
            self.started.set_exception(
                SandboxFailed(f"the sandbox's stage is gone before it was ready: {why}")
            )
            self.started.exception()  # told to whoever waits; nobody may be
        if not self.exited.done():
            self.exited.set_result(None)


def make_pair() -> tuple[socket.socket, int]:
    """(our end, the descriptor that the stage inherits)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = os.dup(theirs.fileno())
    theirs.close()
    return ours, descriptor
