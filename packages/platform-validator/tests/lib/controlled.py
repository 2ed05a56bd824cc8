"""The operators' API over views with nothing to show, behind a real listener."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from starlette.types import ASGIApp

from platform_protocol.ids import JobId, VmName
from platform_validator.attestation.os_image import Shape
from platform_validator.challenges.environment import EnvCommand
from platform_validator.host_name import HostName
from platform_validator.values.commands import ValueCommand
from platform_validator.web.control import Cancelling, Draining, HostDraining, Reloaded
from platform_validator.web.operators import TokenGuard, operators_app
from platform_validator.web.server import WebServer
from platform_validator.web.views import Health

JOB = JobId("00000000-0000-4000-8000-00000000000b")
TOKEN = {"Authorization": "Bearer t0ken"}


class Controlled:
    """Views with nothing to show; a Control that notes what was asked, and answers what a test says."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.cancelling: Cancelling | Exception = Cancelling.CANCELLED
        self.reloaded: Reloaded | Exception = Reloaded()
        self.reclaimed: list[VmName] | Exception = [VmName("pv-stray")]
        self.host: HostDraining | Exception = HostDraining(HostName("big"), "drained", 3)
        self.valued: dict[str, Any] | Exception = {"challenges": []}
        self.pinned: dict[str, Any] | Exception = {"state": "booting"}

    def drain(self, reason: str, *, hurry: bool = False) -> Draining:
        self.asked.append((reason, hurry))
        return Draining("draining", 2, 1, 1050.0, hurry)

    async def cancel_job(self, job_id: JobId) -> Cancelling:
        self.asked.append(job_id)
        if isinstance(self.cancelling, Exception):
            raise self.cancelling
        return self.cancelling

    async def reclaim(self, names: Collection[VmName]) -> list[VmName]:
        self.asked.append(sorted(names))
        if isinstance(self.reclaimed, Exception):
            raise self.reclaimed
        return self.reclaimed

    async def drain_host(self, name: HostName) -> HostDraining:
        self.asked.append(("drain", name))
        if isinstance(self.host, Exception):
            raise self.host
        return self.host

    async def undrain_host(self, name: HostName) -> HostDraining:
        self.asked.append(("undrain", name))
        if isinstance(self.host, Exception):
            raise self.host
        return self.host

    async def env(self, command: EnvCommand) -> dict[str, Any]:
        self.asked.append(command)
        if isinstance(self.valued, Exception):
            raise self.valued
        return self.valued

    async def values(self, command: ValueCommand) -> dict[str, Any]:
        self.asked.append(command)
        if isinstance(self.valued, Exception):
            raise self.valued
        return self.valued

    def pinning(self) -> dict[str, Any]:
        if isinstance(self.pinned, Exception):
            raise self.pinned
        return self.pinned

    def pin(self, image: str, shape: Shape) -> dict[str, Any]:
        self.asked.append((image, shape))
        return self.pinning()

    def reload(self) -> Reloaded:
        self.asked.append("reload")
        if isinstance(self.reloaded, Exception):
            raise self.reloaded
        return self.reloaded

    def health(self) -> Health:
        return Health("running", {})

    def metrics(self) -> tuple[bytes, str] | None:
        return None

    def bundle(self, sha256: str, authorization: str) -> Path | None:
        return None

    def status(self) -> dict[str, Any]:
        return {}

    async def jobs(self, limit: int) -> list[dict[str, Any]]:
        return []

    def cvms(self) -> list[dict[str, Any]]:
        return []

    def hosts(self) -> list[dict[str, Any]]:
        return [{"name": "big"}]

    def challenges(self) -> list[dict[str, Any]]:
        return []

    async def challenge(self, named: str) -> dict[str, Any] | None:
        return {"name": named} if named == "di gits" else None


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the application, behind a real listener."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = WebServer(app, ("127.0.0.1", port))
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(server.run())
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            yield client
        await server.stop()


def over_tcp(controlled: Controlled) -> TokenGuard:
    """As it is on the operators' TCP listener."""
    return TokenGuard(operators_app(controlled, controlled), "t0ken", frozenset({"127.0.0.1"}))
