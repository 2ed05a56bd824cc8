"""What waits to be sent over the live connection; log lines and progress lost on the way are counted."""

from __future__ import annotations

import asyncio

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from platform_protocol.ids import JobId
from platform_protocol.session.messages import Log

_SEND = 60.0
"""Seconds for one frame to leave."""
_MAX_QUEUE = 1000
"""Frames that wait; beyond it lines and progress are lost, which nothing else is."""


class Outgoing:
    """Frames in their order. `run` must be running.

    A frame is *loose* when nobody sends it again after its connection: a log line, or progress. Those known
    to be lost are counted until `gap` tells of them; one that left and never arrived is not known.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[ServerConnection, bytes, bool]] = asyncio.Queue()
        self._lost = 0

    @property
    def full(self) -> bool:
        """Whether loose ones find no room."""
        return self._queue.qsize() >= _MAX_QUEUE

    def put(self, connection: ServerConnection, frame: bytes, *, loose: bool = False) -> None:
        """Send a frame when its turn comes, over this connection and no other."""
        self._queue.put_nowait((connection, frame, loose))

    def lose(self) -> None:
        """A loose one is not even queued: there is no connection, or no room."""
        self._lost += 1

    def gap(self, job_id: JobId | None) -> Log | None:
        """What was lost since this last told, as a line to send before the next message; None: nothing."""
        if not self._lost:
            return None
        lost, self._lost = self._lost, 0
        return Log(level="warning", message=f"log and progress lines lost: {lost}", job_id=job_id)

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            connection, frame, loose = await self._queue.get()
            try:
                async with asyncio.timeout(_SEND):
                    await connection.send(frame)
            except TimeoutError:
                connection.transport.abort()
                self._lost += loose
            except ConnectionClosed:
                self._lost += loose
