"""Serves an application on a TCP address or a Unix socket, inside the daemon's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from platform_validator.errors import ValidatorError

_GRACE = 2
_BACKLOG = 512


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

    Raises:
        AddressInUse: The address cannot be bound.
    """

    def __init__(self, app: ASGIApp, where: tuple[str, int] | Path) -> None:
        self._socket = _bind(where)
        self._path = where if isinstance(where, Path) else None
        config = uvicorn.Config(
            app,
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
