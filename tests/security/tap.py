"""Whoever holds a connection without TLS: a relay that keeps everything that passes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Tap:
    """`async with Tap().open() as tap:`, then set `upstream` and dial `tap.port`."""

    def __init__(self) -> None:
        self.upstream: tuple[str, int] = ("127.0.0.1", 0)
        self.port = 0
        self.seen = bytearray()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Tap]:
        """Relay until the block ends."""
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(*self.upstream)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pass(reader, ours))
            group.create_task(self._pass(theirs, writer))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                self.seen += data
                sink.write(data)
                await sink.drain()
        sink.close()
