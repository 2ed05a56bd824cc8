"""Copies bytes between the host's loopback and a sandbox, keeping half-closes, with a cap on connections."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Awaitable, Callable

import structlog

from platform_vmm.errors import SandboxFailed

Connect = Callable[[], Awaitable[socket.socket]]
MAX_CONNECTIONS = 256
_CHUNK = 256 * 1024
_LAST_BYTES = 30.0
log = structlog.get_logger(__name__)


class Relay:
    """One listening socket; each connection that it accepts is joined to one made by `connect`.

    Attributes:
        forth: Bytes from those that were accepted, so far.
        back: Bytes to them.
    """

    def __init__(self, connect: Connect, maximum: int = MAX_CONNECTIONS) -> None:
        self._connect = connect
        self._maximum = maximum
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.connections = 0
        self.refused = 0
        self.forth = 0
        self.back = 0
        self._pairs = 0

    async def start(self, listener: socket.socket) -> None:
        """Begin to accept on a socket that is the relay's from now on.

        Closed by anyone but its server, a socket stays known to the event loop, which then never looks at
        the next one of that number. So the server is kept before it begins, which may be cancelled.
        """
        self._server = await asyncio.start_server(
            self.carry, sock=listener, limit=_CHUNK, start_serving=False
        )
        await self._server.start_serving()

    async def close(self) -> None:
        """Stop accepting and drop every connection."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self._server.wait_closed()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join one connection with one made by `connect`, until both have ended."""
        if self._pairs >= self._maximum or _crowded(writer):
            self.refused += 1
            writer.transport.abort()
            return
        self._pairs += 1
        self.connections += 1
        self._open.add(writer)
        other: asyncio.StreamWriter | None = None
        try:
            far_reader, other = await asyncio.open_connection(sock=await self._connect(), limit=_CHUNK)
            self._open.add(other)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._copy(reader, other, forth=True))
                both.create_task(self._copy(far_reader, writer, forth=False))
            await _flush(writer, other)
        except* (OSError, RuntimeError, SandboxFailed) as errors:
            log.debug("relay_ended", reason=str(errors.exceptions[0]))
        finally:
            self._pairs -= 1
            for one in (writer, other):
                if one is not None:
                    self._open.discard(one)
                    one.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, forth: bool) -> None:
        while chunk := await reader.read(_CHUNK):
            if forth:
                self.forth += len(chunk)
            else:
                self.back += len(chunk)
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def _crowded(writer: asyncio.StreamWriter) -> bool:
    """Whether guests' connections would take the last quarter of the VMM's descriptors, which it works with.

    The kernel gives the lowest that is free: a high number says how many there are.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptor: int = writer.get_extra_info("socket").fileno()
    return descriptor >= most * 3 // 4


async def _flush(*writers: asyncio.StreamWriter) -> None:
    """Wait until what was written has left, so that closing cuts nothing off."""
    async with asyncio.timeout(_LAST_BYTES):
        for writer in writers:
            writer.close()
            await writer.wait_closed()


def loopback(port: int) -> Connect:
    """Connects to a TCP port of the host's loopback."""

    async def connect() -> socket.socket:
        fresh = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        fresh.setblocking(False)
        try:
            async with asyncio.timeout(5):
                await asyncio.get_running_loop().sock_connect(fresh, ("127.0.0.1", port))
        except BaseException:
            fresh.close()
            raise
        return fresh

    return connect
