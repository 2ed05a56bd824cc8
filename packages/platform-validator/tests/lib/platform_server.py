"""A server on loopback that answers the HTTP client with whatever a test wants."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from aiohttp import web

from platform_protocol.ids import ChallengeId, JobId, LeaseToken
from platform_protocol.signing import Keypair
from platform_validator.clock import SystemClock
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.signer import RequestSigner

KEY = Keypair.from_seed(bytes(32))
NOW = datetime(2026, 1, 1, tzinfo=UTC)
CHALLENGE = ChallengeId("00000000-0000-4000-8000-000000000001")
JOB = JobId("00000000-0000-4000-8000-000000000002")
TOKEN = LeaseToken("token")
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """A server on loopback that answers everything with one function."""

    def __init__(self) -> None:
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []
        self.answer: Answer = self._nothing
        self.url = ""

    async def _nothing(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=404)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Note the request and answer it."""
        self.requests.append(request)
        self.bodies.append(await request.read())
        return await self.answer(request)

    def says(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        """Answer everything with this."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def answer(request: web.Request) -> web.StreamResponse:
            return web.Response(status=status, body=data, headers=headers)

        self.answer = answer


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    """A running server."""
    scripted = Server()
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{tail:.*}", scripted.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    scripted.url = f"http://127.0.0.1:{port}"
    try:
        yield scripted
    finally:
        await runner.cleanup()


@asynccontextmanager
async def client_of(server: Server) -> AsyncIterator[HttpPlatformClient]:
    """A client of it."""
    async with HttpPlatformClient(
        base_url=server.url, signer=signer(server), clock=SystemClock(), timeout=timedelta(seconds=5)
    ) as made:
        yield made


def signer(server: Server) -> RequestSigner:
    """Signs for the server's origin."""
    return RequestSigner(keypair=KEY, base_url=server.url, instance="instance", clock=SystemClock())
