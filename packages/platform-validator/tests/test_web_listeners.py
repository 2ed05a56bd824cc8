"""The daemon over HTTP, on real sockets: what guests may see, what operators may."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from ports import free_port
from starlette.types import ASGIApp

from platform_protocol.ids import JobId, VmName
from platform_validator.attestation.os_image import Shape
from platform_validator.challenges.environment import EnvCommand
from platform_validator.host_name import HostName
from platform_validator.values.commands import ValueCommand
from platform_validator.web.control import Cancelling, Draining, HostDraining, Reloaded
from platform_validator.web.guests import guests_app
from platform_validator.web.operators import TokenGuard, operators_app
from platform_validator.web.server import AddressInUse, WebServer
from platform_validator.web.views import Health

BUNDLE = "a" * 64
REASON = "http://10.1.2.3:8080 refuses"


class Shown:
    """Views that say what a test put there."""

    def __init__(self, folder: Path) -> None:
        self.phase = "running"
        self.words = {"vmm": "ok"}
        self.exposition: tuple[bytes, str] | None = (b"up 1\n", "text/plain; version=0.0.4")
        self.bundle_file = folder / "bundle.tar"
        self.bundle_file.write_bytes(bytes(range(100)))

    def health(self) -> Health:
        return Health(self.phase, self.words, {"vmm": REASON})

    def metrics(self) -> tuple[bytes, str] | None:
        return self.exposition

    def bundle(self, sha256: str, authorization: str) -> Path | None:
        return self.bundle_file if (sha256, authorization) == (BUNDLE, "Bearer pv-1.mac") else None

    def status(self) -> dict[str, Any]:
        return {"status": self.health().status, "reasons": self.health().reasons}

    async def jobs(self, limit: int) -> list[dict[str, Any]]:
        return [{"limit": limit}]

    def cvms(self) -> list[dict[str, Any]]:
        return []

    def hosts(self) -> list[dict[str, Any]]:
        return []

    def challenges(self) -> list[dict[str, Any]]:
        return []

    async def challenge(self, named: str) -> dict[str, Any] | None:
        return {"name": named} if named == "di gits" else None


class Uncontrolled:
    """Nothing here asks for anything."""

    def drain(self, reason: str, *, hurry: bool = False) -> Draining:
        raise NotImplementedError

    async def cancel_job(self, job_id: JobId) -> Cancelling:
        raise NotImplementedError

    async def reclaim(self, names: Collection[VmName]) -> list[VmName]:
        raise NotImplementedError

    async def drain_host(self, name: HostName) -> HostDraining:
        raise NotImplementedError

    async def undrain_host(self, name: HostName) -> HostDraining:
        raise NotImplementedError

    async def env(self, command: EnvCommand) -> dict[str, Any]:
        return {}

    async def values(self, command: ValueCommand) -> dict[str, Any]:
        raise NotImplementedError

    def pinning(self) -> dict[str, Any]:
        raise NotImplementedError

    def pin(self, image: str, shape: Shape) -> dict[str, Any]:
        raise NotImplementedError

    def reload(self) -> Reloaded:
        raise NotImplementedError


@pytest.fixture
def shown(tmp_path: Path) -> Shown:
    return Shown(tmp_path)


@asynccontextmanager
async def served(app: ASGIApp, *, guests: bool = False) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the application, behind a real listener."""
    port = free_port()
    server = WebServer(app, ("127.0.0.1", port), guests=guests)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(server.run())
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            yield client
        await server.stop()


@pytest.mark.parametrize(
    ("phase", "word", "status", "code"),
    [
        ("starting", "ok", "starting", 503),
        ("running", "ok", "ok", 200),
        ("running", "fails", "degraded", 200),
        ("draining", "ok", "draining", 503),
        ("stopping", "fails", "stopping", 503),
    ],
)
async def test_health_says_whether_it_serves(
    shown: Shown, phase: str, word: str, status: str, code: int
) -> None:
    """200 when ok or degraded, 503 otherwise; guests read component names, never reasons."""
    shown.phase, shown.words = phase, {"vmm": word}
    async with served(guests_app(shown)) as client, client.get("/health") as answer:
        text = await answer.text()
        assert answer.status == code
        assert await answer.json() == {"status": status, "components": {"vmm": word}}
        assert REASON not in text


async def test_live_while_the_loop_turns(shown: Shown) -> None:
    shown.phase = "starting"
    async with served(guests_app(shown)) as client, client.get("/health/live") as answer:
        assert answer.status == 200


async def test_metrics_are_served_unless_they_are_off(shown: Shown) -> None:
    async with served(guests_app(shown)) as client:
        async with client.get("/metrics") as answer:
            assert (answer.status, await answer.read()) == (200, b"up 1\n")
        shown.exposition = None
        async with client.get("/metrics") as answer:
            assert answer.status == 404


@pytest.mark.parametrize(
    ("sha256", "authorization"),
    [
        (BUNDLE, ""),
        (BUNDLE, "Bearer pv-2.mac"),
        ("b" * 64, "Bearer pv-1.mac"),
        ("..%2f..%2fetc%2fpasswd", "Bearer pv-1.mac"),
        (BUNDLE.upper(), "Bearer pv-1.mac"),
    ],
)
async def test_a_bundle_is_not_there_for_others(shown: Shown, sha256: str, authorization: str) -> None:
    """404 whatever is wrong: nobody learns which bundles exist."""
    headers = {"Authorization": authorization}
    path = f"/bundles/{sha256}"
    async with served(guests_app(shown)) as client, client.get(path, headers=headers) as answer:
        assert answer.status == 404


async def test_a_bundle_is_fetched_whole_or_in_parts(shown: Shown) -> None:
    headers = {"Authorization": "Bearer pv-1.mac"}
    async with served(guests_app(shown)) as client:
        async with client.get(f"/bundles/{BUNDLE}", headers=headers) as answer:
            assert (answer.status, await answer.read()) == (200, bytes(range(100)))
        async with client.get(f"/bundles/{BUNDLE}", headers={**headers, "Range": "bytes=90-"}) as answer:
            assert (answer.status, await answer.read()) == (206, bytes(range(90, 100)))


@pytest.mark.robustness(26, "slow-loris")
async def test_guests_that_hold_connections_and_say_nothing_keep_nobody_out(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many at once, of which the oldest makes room for the next; and none of them for long."""
    monkeypatch.setattr("platform_validator.web.server.GUESTS_HELD", 8)
    monkeypatch.setattr("platform_validator.web.server.GUEST_LIFE", 0.5)
    async with served(guests_app(shown), guests=True) as client:
        url = client._base_url
        assert url is not None
        silent = [await asyncio.open_connection(url.host, url.port) for _ in range(12)]
        for _, writer in silent:
            writer.write(b"GET /health HTTP/1.1\r\nX-Slow: ")
        async with client.get("/health/live") as answer:
            assert answer.status == 200
        for reader, writer in silent:
            with suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()


async def test_guests_see_no_operators_api(shown: Shown) -> None:
    async with served(guests_app(shown)) as client, client.get("/api/v1/status") as answer:
        assert answer.status == 404


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic t0ken"}, 401),
        ({"Authorization": "Bearer t0ken", "Host": "evil.example"}, 421),
        ({"Authorization": "Bearer t0ken"}, 200),
    ],
)
async def test_operators_need_a_token_and_our_host(shown: Shown, headers: dict[str, str], code: int) -> None:
    """The Host check is against pages that rebind their name to us."""
    guard = TokenGuard(operators_app(shown, Uncontrolled()), "t0ken", frozenset({"127.0.0.1"}))
    async with served(guard) as client, client.get("/api/v1/status", headers=headers) as answer:
        assert answer.status == code
        assert (REASON in await answer.text()) == (code == 200)


@pytest.mark.parametrize(("query", "limit"), [("", 100), ("?limit=7", 7), ("?limit=99999999", 10_000)])
async def test_jobs_are_limited(shown: Shown, query: str, limit: int) -> None:
    async with (
        served(operators_app(shown, Uncontrolled())) as client,
        client.get(f"/api/v1/jobs{query}") as answer,
    ):
        assert await answer.json() == [{"limit": limit}]


async def test_a_challenge_is_shown_by_its_id_or_name(shown: Shown) -> None:
    """Percent-encoded like any name; one that is not there is 404 with a code."""
    async with served(operators_app(shown, Uncontrolled())) as client:
        async with client.get("/api/v1/challenges/di%20gits") as answer:
            assert await answer.json() == {"name": "di gits"}
        async with client.get("/api/v1/challenges/another") as answer:
            assert (answer.status, (await answer.json())["code"]) == (404, "unknown_challenge")


async def test_a_unix_socket_is_private_and_goes_with_the_server(shown: Shown, tmp_path: Path) -> None:
    """One that a killed daemon left is replaced."""
    path = tmp_path / "validator.sock"
    path.touch()
    server = WebServer(operators_app(shown, Uncontrolled()), path)
    assert path.stat().st_mode & 0o777 == 0o600
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(server.run())
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as client,
            client.get("http://validator/api/v1/cvms") as answer,
        ):
            assert await answer.json() == []
        await server.stop()
    assert not path.exists()


async def test_a_taken_port_names_the_setting(shown: Shown) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"127.0.0.1:{port} cannot be bound.*VALIDATOR_HTTP_LISTEN"):
            WebServer(guests_app(shown), ("127.0.0.1", port))
