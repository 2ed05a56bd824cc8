"""The bytes of one connection, in both directions: counted, paced, and ended when none come for too long."""

from __future__ import annotations

import asyncio
import contextlib

from platform_validator.egress.accounts import Account
from platform_validator.egress.dialing import Stream
from platform_validator.egress.refusals import Refused

IDLE = 300.0
"""Seconds without a byte either way."""
_CHUNK = 64 * 1024


class Flow:
    """Made once a connection, and used within `async with flow.timeout`, which ends one that is idle."""

    def __init__(self, account: Account, idle: float = IDLE) -> None:
        self._account = account
        self._idle = idle
        self.timeout = asyncio.timeout(idle)

    async def send(self, stream: Stream, data: bytes) -> None:
        """From the guest to a host. Raises Refused when its bytes are spent, OSError."""
        await self._move(stream, data, sent=len(data))

    async def give(self, stream: Stream, data: bytes) -> None:
        """From a host to the guest. Raises as `send`."""
        await self._move(stream, data, received=len(data))

    async def relay(self, guest: Stream, host: Stream) -> None:
        """Both ways until both have ended; one that ends writing does so on the other side, too.

        Raises:
            Refused: BYTES_SPENT.
            OSError: A side broke off.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(guest, host, sending=True))
                group.create_task(self._pump(host, guest, sending=False))
        except ExceptionGroup as errors:
            refused = errors.subgroup(Refused)
            raise (errors if refused is None else refused).exceptions[0] from errors

    async def _pump(self, source: Stream, target: Stream, *, sending: bool) -> None:
        while data := await source[0].read(_CHUNK):
            await (self.send if sending else self.give)(target, data)
        with contextlib.suppress(OSError):
            target[1].write_eof()

    async def _move(self, stream: Stream, data: bytes, *, sent: int = 0, received: int = 0) -> None:
        now = asyncio.get_running_loop().time()
        wait = self._account.count(sent=sent, received=received, now=now)
        stream[1].write(data)
        self._alive(wait)
        await stream[1].drain()
        if wait:
            await asyncio.sleep(wait)
        self._alive()

    def _alive(self, wait: float = 0.0) -> None:
        # One direction may still come here while the other's silence ends both.
        if not self.timeout.expired():
            self.timeout.reschedule(asyncio.get_running_loop().time() + self._idle + wait)
