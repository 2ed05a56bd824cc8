"""A Platform API on loopback that answers everything as a test says, HTTP and WebSocket; clients of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from aiohttp import web

from platform_protocol.signing import Keypair
from platform_validator.clock import SystemClock
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.renewals import BlockingRenewals
from platform_validator.platform_client.signer import RequestSigner

KEY = Keypair.from_seed(bytes(32))
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Scripted:
    """What it was asked, and what it answers."""

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

    def says(self, status: int, body: object = b"", headers: Mapping[str, str] | None = None) -> None:
        """Answer everything with this; what is no bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def answer(request: web.Request) -> web.StreamResponse:
            return web.Response(status=status, body=data, headers=headers)

        self.answer = answer

    def sends(self, frames: Sequence[str | bytes], code: int = 1000) -> None:
        """Send these frames on every WebSocket, and close it with this code."""
        self.answer = closing(frames, code)


def closing(frames: Sequence[str | bytes], code: int) -> Answer:
    """Sends these frames on a WebSocket, and closes it with this code."""

    async def answer(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for frame in frames:
            await (socket.send_str(frame) if isinstance(frame, str) else socket.send_bytes(frame))
        await socket.close(code=code)
        return socket

    return answer


@asynccontextmanager
async def scripted() -> AsyncIterator[Scripted]:
    """A running one."""
    server = Scripted()
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def client_of(url: str, seconds: float = 10.0) -> HttpPlatformClient:
    """The real client, patient for so many seconds a call."""
    patience = timedelta(seconds=seconds)
    return HttpPlatformClient(
        base_url=url, signer=signer(url), clock=SystemClock(), timeout=patience, download_timeout=patience
    )


def renewals_of(url: str, seconds: float = 10.0) -> BlockingRenewals:
    """The leases' blocking client."""
    return BlockingRenewals(
        base_url=url, signer=signer(url), clock=SystemClock(), timeout=timedelta(seconds=seconds)
    )


def signer(url: str) -> RequestSigner:
    """Signs for that origin."""
    return RequestSigner(keypair=KEY, base_url=url, instance="instance", clock=SystemClock())
