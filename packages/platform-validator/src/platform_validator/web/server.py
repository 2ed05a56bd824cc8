"""Serves an application on a TCP address or a Unix socket, inside the daemon's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from platform_validator.errors import ValidatorError

_GRACE = 2
_BACKLOG = 512
GUESTS_HELD = 512
"""Connections of guests at once; for one more the oldest ends."""
GUEST_LIFE = 120.0
"""Seconds that a connection of a guest lives; what is fetched is fetched on where it broke."""


class AddressInUse(ValidatorError):
    """A listener's address cannot be had."""


class _Server(uvicorn.Server):
    """Leaves signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class WebServer:
    """Bound when made, so that a taken address is known at once; serves in `run`.

    `guests`: whoever connects may be a guest, which may hold as many connections as it can, and say nothing.

    Raises:
        AddressInUse: The address cannot be bound.
    """

    def __init__(self, app: ASGIApp, where: tuple[str, int] | Path, *, guests: bool = False) -> None:
        self._socket = _bind(where)
        self._path = where if isinstance(where, Path) else None
        config = uvicorn.Config(
            app,
            http=_guests_connection() if guests else H11Protocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE,
            server_header=False,
        )
        self._server = _Server(config)

    async def run(self) -> None:
        """Until cancelled or stopped."""
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self.close()

    def close(self) -> None:
        """Give the address back; `run` does so by itself."""
        self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def stop(self) -> None:
        """Finish what is being answered, then end `run`."""
        self._server.should_exit = True
        await asyncio.sleep(0)


def _guests_connection() -> type[H11Protocol]:
    """A connection of one listener for guests: uvicorn's own waits for a request for ever."""
    held: dict[H11Protocol, asyncio.TimerHandle] = {}

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as theirs
            super().connection_made(transport)
            held[self] = self.loop.call_later(GUEST_LIFE, transport.abort)
            if len(held) > GUESTS_HELD:
                next(iter(held)).transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            held.pop(self).cancel()
            super().connection_lost(exc)

    return Connection


def _bind(where: tuple[str, int] | Path) -> socket.socket:
    if isinstance(where, Path):
        where.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(where))
            where.chmod(0o600)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise AddressInUse(f"{where} cannot be bound: {error.strerror}") from error
        return listener
    host, port = where
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise AddressInUse(
            f"{host}:{port} cannot be bound: {error.strerror}: "
            "set VALIDATOR_HTTP_LISTEN or VALIDATOR_ADMIN_LISTEN"
        ) from error
    return listener
