"""`platform-api serve`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Annotated

import typer
import uvicorn
from sqlalchemy.exc import SQLAlchemyError

from platform_api.app import make_app
from platform_api.cli.console import DatabaseUrl, fail, settings
from platform_api.config import ApiSettings
from platform_api.database import Database
from platform_api.telemetry import LogForm, configure_logs

_KEEP_ALIVE_S = 75
"""Validators poll every 5 s: uvicorn's own 5 s would close connections just as they are used again."""
_DRAIN_S = 5
_MAX_FRAME = 64 * 1024


def serve(
    *,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT (default 127.0.0.1:8080)")] = None,
    database_url: DatabaseUrl = None,
    public_url: Annotated[str | None, typer.Option(help="The URL that validators sign for")] = None,
    audience: Annotated[list[str] | None, typer.Option(help="Accepted audiences (repeatable)")] = None,
    lease_term: Annotated[str | None, typer.Option(help="Length of a lease (default 120s)")] = None,
    log_format: Annotated[str, typer.Option("--log", help="people or json")] = "people",
) -> None:
    """Run the server until SIGTERM. Flags come before PLATFORM_API_* of the environment."""
    found = settings(
        listen=listen,
        database_url=database_url,
        public_url=public_url,
        audiences=audience,
        lease_term=lease_term,
    )
    form: LogForm = "json" if log_format == "json" else "people"
    configure_logs(form)
    _prepare_database(found)
    listener = _listen(found)
    config = uvicorn.Config(
        make_app(found),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="websockets-sansio",
        ws_max_size=_MAX_FRAME,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    server = _Server(config)
    with listener:
        server.run(sockets=[listener])
    if not server.started:
        fail("the server did not start: its log says why")


class _Server(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM, instead of raising the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the server in an orderly way."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def _prepare_database(found: ApiSettings) -> None:
    """Migrate before anything listens, so that what is wrong is one sentence and no traceback."""

    async def migrate() -> None:
        await (await Database.open(found.database_url)).close()

    try:
        asyncio.run(migrate())
    except (SQLAlchemyError, OSError) as error:
        fail(f"the database cannot be used: {str(error)[:500]}")


def _listen(found: ApiSettings) -> socket.socket:
    host, port = found.address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        fail(f"cannot listen on {found.listen}: {error.strerror or error}")
