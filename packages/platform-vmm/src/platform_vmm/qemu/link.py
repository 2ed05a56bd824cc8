"""The VMM's end of a virtual machine's control port, and the connections that it asks for.

What comes over the port is the guest's word: each line is short, checked, and can do no more than what this
virtual machine may do anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from platform_vmm.errors import SandboxFailed
from platform_vmm.qemu.guest.exchange import AGENT, MOST_TO_AGENT
from platform_vmm.sandbox.relay import MAX_CONNECTIONS, Relay

_LINE = 4096
_PACE = 0.001
"""Between two lines: a guest that sends them without end costs the VMM little."""
_TOLD = ("memory_bytes", "memory_peak_bytes", "disk_total_bytes", "disk_free_bytes")
log = structlog.get_logger(__name__)


class Link:
    """Waits at `path` for QEMU's one connection.

    Attributes:
        up: Done when the service was started; its exception says why it was not.
        exited: Done with the service's exit code, or None when the port closed without one.
        usage: What the guest told last, in bytes.
        config: What the guest is told first; set before `listen`.
    """

    def __init__(
        self,
        name: str,
        *,
        dial: Callable[[str], Awaitable[socket.socket]],
        targets: Mapping[str, Relay],
    ) -> None:
        """Make a link.

        Args:
            name: Of the virtual machine, for the log.
            dial: Makes a connection into the machine, which reads the header first.
            targets: What the guest may ask for, by name.
        """
        self._name = name
        self._dial = dial
        self._targets = targets
        self._server: asyncio.Server | None = None
        self._port: asyncio.StreamWriter | None = None
        self._greeted = False
        self._carrying: dict[asyncio.Task[None], str] = {}
        loop = asyncio.get_running_loop()
        self.up: asyncio.Future[bool] = loop.create_future()
        self.exited: asyncio.Future[int | None] = loop.create_future()
        self.usage: dict[str, int] = {}
        self.config: Mapping[str, Any] = {}

    async def listen(self, path: Path) -> None:
        """Begin to wait.

        Raises:
            OSError: The socket cannot be made there.
        """
        path.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            address = (
                f"/proc/self/fd/{folder}/{path.name}"  # a socket's path is short, a folder's need not be
            )
            self._server = await asyncio.start_unix_server(
                self._connected, address, limit=_LINE, start_serving=False
            )
        finally:
            os.close(folder)
        path.chmod(0o666)
        await self._server.start_serving()  # may be cancelled: by now `close` knows it

    def terminate(self) -> None:
        """Ask the guest to end its service with SIGTERM."""
        self._send(terminate=True)

    async def close(self) -> None:
        """Hang up, and drop what was carried. Safe to call again."""
        if self._server is not None:
            self._server.close()
        if self._port is not None:
            self._port.transport.abort()
        for task in list(self._carrying):
            task.cancel()
        for relay in self._targets.values():
            await relay.close()
        self._over("the VMM hung up")

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._port is not None:
            writer.transport.abort()
            return
        self._port = writer
        why = "the machine ended"
        try:
            while line := await reader.readline():
                self._told(_message(line))
                await writer.drain()  # one that asks and does not read its answers is read no further
                await asyncio.sleep(_PACE)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            why = f"it sent what is no message: {type(error).__name__}"
            log.warning("guest_port_closed", vm=self._name, reason=why)
        except OSError as error:
            why = str(error)
        finally:
            writer.transport.abort()
            self._over(why)

    def _told(self, message: dict[str, Any]) -> None:
        """One message. What a guest may say twice changes nothing the second time."""
        if "hello" in message:
            if not self._greeted:
                self._greeted = True
                self._send(**self.config)
        elif "up" in message:
            if not self.up.done():
                self.up.set_result(bool(message.get("walled")))
        elif "failed" in message:
            self._over(f"it failed: {str(message['failed'])[:1024]}")
        elif "usage" in message:
            self.usage = {name: _amount(message["usage"][name]) for name in _TOLD}
        elif "exit" in message:
            if not self.exited.done():
                self.exited.set_result(_amount(message["exit"]) % 256)
        elif "open" in message:
            self._open(_amount(message["open"]), str(message["to"]))

    def _open(self, number: int, to: str) -> None:
        relay = self._targets.get(to)
        held = [one for one in self._carrying.values() if (one == AGENT) == (to == AGENT)]
        if relay is None or len(held) >= (MOST_TO_AGENT if to == AGENT else MAX_CONNECTIONS):
            self._send(refused=number)
            return
        task = asyncio.ensure_future(self._carry(number, relay))
        self._carrying[task] = to
        task.add_done_callback(self._carrying.pop)

    async def _carry(self, number: int, relay: Relay) -> None:
        try:
            inside = await self._dial(f"O {number}\n")
            reader, writer = await asyncio.open_connection(sock=inside)
        except (OSError, SandboxFailed) as error:
            log.debug("guest_not_reached", vm=self._name, reason=str(error))
            self._send(refused=number)
            return
        await relay.carry(reader, writer)

    def _send(self, **message: Any) -> None:
        if self._port is not None and not self._port.transport.is_closing():
            with contextlib.suppress(OSError):
                self._port.write(json.dumps(message).encode() + b"\n")

    def _over(self, why: str) -> None:
        if not self.up.done():
            self.up.set_exception(SandboxFailed(why))
            self.up.exception()  # told to whoever waits; nobody may be
        if not self.exited.done():
            self.exited.set_result(None)


def _message(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise TypeError
    return value


def _amount(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError
    return value
