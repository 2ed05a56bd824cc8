"""Drain, cancel and reload over HTTP, on real sockets: answers, and who may ask."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.types import ASGIApp

from platform_protocol.ids import ChallengeId, JobId, VmName
from platform_protocol.values import ValueInvalid
from platform_validator.attestation.os_image import Shape
from platform_validator.challenges.environment import EnvCommand, EnvRefused
from platform_validator.cvm.hosts import UnknownHost
from platform_validator.cvm.vmm import VmmUnavailable
from platform_validator.host_name import HostName
from platform_validator.store.port import StoreUnavailable
from platform_validator.values.commands import GetValue, ValueCommand
from platform_validator.values.errors import ValueKeysUnusable, ValueRefused, ValueUnreadable
from platform_validator.web.control import Cancelling, Draining, HostDraining, NotStarted, PinBusy, Reloaded
from platform_validator.web.operators import TokenGuard, operators_app
from platform_validator.web.server import WebServer
from platform_validator.web.views import Health

JOB = JobId("00000000-0000-4000-8000-00000000000b")
TOKEN = {"Authorization": "Bearer t0ken"}
PIN = "/api/v1/attestation/pin"
POSTS = [
    "/api/v1/drain",
    f"/api/v1/jobs/{JOB}/cancel",
    "/api/v1/cvms/reclaim",
    "/api/v1/hosts/big/drain",
    "/api/v1/hosts/big/undrain",
    "/api/v1/values",
    "/api/v1/env",
    PIN,
    "/api/v1/reload",
]


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


@pytest.fixture
def controlled() -> Controlled:
    return Controlled()


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


@pytest.mark.parametrize(
    ("body", "hurry"),
    [(b"", False), (b"{}", False), (b'{"hurry": false}', False), (b'{"hurry": true}', True)],
)
async def test_a_drain_is_begun_and_says_what_is_left(
    controlled: Controlled, body: bytes, hurry: bool
) -> None:
    async with (
        served(operators_app(controlled, controlled)) as client,
        client.post("/api/v1/drain", data=body) as answer,
    ):
        assert answer.status == 202
        assert await answer.json() == {
            "phase": "draining",
            "jobs": 2,
            "undelivered": 1,
            "within_s": 1050.0,
            "hurried": hurry,
        }
    assert controlled.asked == [("operator", hurry)]


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"hurry": 1}', b"[" * 4000, b" " * 5000, b"\xff"])
async def test_a_drain_that_is_not_understood_is_none(controlled: Controlled, body: bytes) -> None:
    async with (
        served(operators_app(controlled, controlled)) as client,
        client.post("/api/v1/drain", data=body) as answer,
    ):
        assert answer.status == 400
        assert (await answer.json())["code"] == "bad_body"
    assert controlled.asked == []


@pytest.mark.parametrize(
    ("answered", "status", "code"),
    [
        (Cancelling.CANCELLED, 202, None),
        (Cancelling.UNKNOWN, 404, "unknown_job"),
        (Cancelling.CLAIMING, 409, "being_claimed"),
        (Cancelling.STORED, 409, "result_stored"),
        (Cancelling.ENDED, 409, "job_ended"),
        (NotStarted("starting"), 409, "not_started"),
        (StoreUnavailable("disk full"), 503, "journal_unreadable"),
    ],
)
@pytest.mark.robustness(17, "after-the-result", "twice", "unknown")
async def test_a_cancellation_is_answered_by_what_the_job_does(
    controlled: Controlled, answered: Cancelling | Exception, status: int, code: str | None
) -> None:
    """Robustness 17: after the result, twice, and for an unknown job too."""
    controlled.cancelling = answered
    async with (
        served(operators_app(controlled, controlled)) as client,
        client.post(f"/api/v1/jobs/{JOB}/cancel") as answer,
    ):
        assert answer.status == status
        assert (await answer.json()).get("code") == code
    assert controlled.asked == [JOB]


async def test_an_image_is_measured_at_a_shape_and_looked_at_by_get(controlled: Controlled) -> None:
    async with served(operators_app(controlled, controlled)) as client:
        body = b'{"image": "dstack-0.6.0", "cpu": 2, "memory_mb": 2048}'
        async with client.post("/api/v1/attestation/pin", data=body) as answer:
            assert (answer.status, await answer.json()) == (202, {"state": "booting"})
        async with client.get("/api/v1/attestation/pin") as answer:
            assert (answer.status, await answer.json()) == (200, {"state": "booting"})
    assert controlled.asked == [("dstack-0.6.0", Shape(2, 2048, 0))]


@pytest.mark.parametrize(
    ("body", "answered", "status", "code"),
    [
        (b"[]", None, 400, "bad_body"),
        (b'{"image": "i"}', None, 400, "bad_body"),
        (b'{"image": "", "cpu": 1, "memory_mb": 1}', None, 400, "bad_body"),
        (b'{"image": "i", "cpu": true, "memory_mb": 1}', None, 400, "bad_body"),
        (b'{"image": "i", "cpu": 1, "memory_mb": 1, "gpus": -1}', None, 400, "bad_body"),
        (b'{"image": "i", "cpu": 1, "memory_mb": 1}', PinBusy("another"), 409, "busy"),
        (b'{"image": "i", "cpu": 1, "memory_mb": 1}', NotStarted("starting"), 409, "not_started"),
    ],
)
async def test_a_pin_that_cannot_be_begun_says_why(
    controlled: Controlled, body: bytes, answered: Exception | None, status: int, code: str
) -> None:
    controlled.pinned = answered or controlled.pinned
    async with (
        served(operators_app(controlled, controlled)) as client,
        client.post("/api/v1/attestation/pin", data=body) as answer,
    ):
        assert (answer.status, (await answer.json())["code"]) == (status, code)


async def test_a_reload_tells_what_applies_and_what_waits(controlled: Controlled) -> None:
    controlled.reloaded = Reloaded(
        applied=[{"setting": "jobs.max_concurrent", "old": 4, "new": 2}],
        restart=[{"setting": "dstack.vmm_url", "old": "a", "new": "b", "reason": "because"}],
    )
    async with (
        served(operators_app(controlled, controlled)) as client,
        client.post("/api/v1/reload") as answer,
    ):
        assert answer.status == 200
        assert await answer.json() == {
            "applied": controlled.reloaded.applied,
            "restart": controlled.reloaded.restart,
        }


@pytest.mark.parametrize(
    ("answered", "status", "told"),
    [
        (Reloaded(faults=["jobs.max_concurrent: no"]), 422, ["jobs.max_concurrent: no"]),
        (NotStarted("starting"), 409, None),
    ],
)
async def test_a_reload_that_changes_nothing_says_why(
    controlled: Controlled, answered: Reloaded | Exception, status: int, told: list[str] | None
) -> None:
    controlled.reloaded = answered
    async with (
        served(operators_app(controlled, controlled)) as client,
        client.post("/api/v1/reload") as answer,
    ):
        assert answer.status == status
        assert (await answer.json()).get("faults") == told


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        (None, 200, None),
        (UnknownHost("no VMM host is called 'huge': there are big"), 404, "unknown_host"),
        (NotStarted("starting"), 409, "not_started"),
        (StoreUnavailable("the disk is full"), 503, "journal_unwritable"),
    ],
)
async def test_a_host_is_drained_or_it_is_said_why_not(
    controlled: Controlled, said: Exception | None, status: int, code: str | None
) -> None:
    """The name may have any character in it; what it still has is told."""
    controlled.host = said or controlled.host
    async with (
        served(operators_app(controlled, controlled)) as client,
        client.post("/api/v1/hosts/hu%2Dge/drain") as answer,
        client.get("/api/v1/hosts") as listed,
    ):
        assert answer.status == status
        found = await answer.json()
        assert await listed.json() == [{"name": "big"}]
    assert controlled.asked == [("drain", "hu-ge")]
    assert found.get("code") == code
    if said is None:
        assert found == {"host": "big", "state": "drained", "cvms": 3}


@pytest.mark.parametrize("path", [path for path in POSTS if path != PIN])
async def test_reading_changes_nothing(controlled: Controlled, path: str) -> None:
    """What a link, an image or a prefetch can send is GET."""
    async with served(over_tcp(controlled)) as client, client.get(path, headers=TOKEN) as answer:
        assert answer.status == 405
    assert controlled.asked == []


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Cookie": "token=t0ken"}, 401),
        ({**TOKEN, "Host": "rebound.example"}, 421),
        ({**TOKEN, "Origin": "https://evil.example"}, 403),
        ({**TOKEN, "Origin": "http://127.0.0.1:1"}, 403),
        ({**TOKEN, "Origin": "null"}, 403),
        ({**TOKEN, "Sec-Fetch-Site": "cross-site"}, 403),
        ({**TOKEN, "Sec-Fetch-Site": "same-site"}, 403),
    ],
)
async def test_a_page_elsewhere_cannot_ask(
    controlled: Controlled, path: str, headers: dict[str, str], status: int
) -> None:
    """Without the token, under another name, or from another site: nothing is done."""
    async with served(over_tcp(controlled)) as client, client.post(path, headers=headers) as answer:
        assert answer.status == status
        assert (await answer.json())["error"]
    assert controlled.asked == []


@pytest.mark.parametrize("own_page", [False, True])
async def test_a_tool_with_the_token_can_ask(controlled: Controlled, own_page: bool) -> None:
    """And so can a page that this very listener served."""
    async with served(over_tcp(controlled)) as client:
        headers = dict(TOKEN)
        if own_page:
            headers |= {"Origin": str(client._base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
        for path in POSTS:
            bodies = {
                "reclaim": {"names": []},
                "values": {"do": "scopes"},
                "env": {"do": "list"},
                "pin": {"image": "i", "cpu": 1, "memory_mb": 1},
            }
            body = bodies.get(path.rsplit("/")[-1], {})
            async with client.post(path, json=body, headers=headers) as answer:
                assert answer.status in (200, 202)
    assert len(controlled.asked) == len(POSTS)


async def test_a_preflight_gets_no_leave(controlled: Controlled) -> None:
    """Nothing here tells a browser that another site may send the token."""
    headers = {
        "Origin": "https://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    async with served(over_tcp(controlled)) as client, client.options(POSTS[0], headers=headers) as answer:
        assert answer.status == 401
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


async def test_strays_are_reclaimed_by_name(controlled: Controlled) -> None:
    """The names that the operator saw, and what came of them."""
    async with served(over_tcp(controlled)) as client:
        names = {"names": ["pv-stray", "pv-other"]}
        async with client.post("/api/v1/cvms/reclaim", json=names, headers=TOKEN) as answer:
            assert answer.status == 202
            assert await answer.json() == {"reclaiming": ["pv-stray"]}
    assert controlled.asked == [["pv-other", "pv-stray"]]


@pytest.mark.parametrize(
    ("body", "fault", "status"),
    [
        (b"", None, 400),
        (b'{"names": "pv-stray"}', None, 400),
        (b'{"names": [1]}', None, 400),
        (b'{"names": []}', NotStarted("starting"), 409),
        (b'{"names": []}', VmmUnavailable("connection refused"), 503),
    ],
)
async def test_strays_that_cannot_be_reclaimed(
    controlled: Controlled, body: bytes, fault: Exception | None, status: int
) -> None:
    """Bad bodies reach nobody; what cannot be done now says why."""
    controlled.reclaimed = fault or []
    async with (
        served(over_tcp(controlled)) as client,
        client.post("/api/v1/cvms/reclaim", data=body, headers=TOKEN) as answer,
    ):
        assert answer.status == status
        assert (await answer.json())["error"]
    assert len(controlled.asked) == (fault is not None)


@pytest.mark.parametrize(
    ("body", "fault", "status", "code"),
    [
        (b'{"do": "list"}', None, 200, None),
        (
            b'{"do": "unset", "challenge_id": "c", "name": "N"}',
            EnvRefused("not_found", "no"),
            404,
            "not_found",
        ),
        (b'{"do": "unset", "challenge_id": "c", "name": "N"}', EnvRefused("bad_name", "no"), 422, "bad_name"),
        (b'{"do": "list"}', NotStarted("soon"), 409, "not_started"),
        (b'{"do": "list"}', StoreUnavailable("full"), 503, "journal_unavailable"),
        (b'{"do": "set", "value": {"secret": "canary"}}', None, 400, "bad_body"),
        (b'{"do": "show"}', None, 400, "bad_body"),
        (b"[" * 100_000, None, 400, "bad_body"),
        (b" " * 600_000, None, 413, "too_large"),
    ],
)
async def test_environment_goes_in_by_post(
    controlled: Controlled, body: bytes, fault: Exception | None, status: int, code: str | None
) -> None:
    """Every refusal has its word, and none repeats what was sent."""
    controlled.valued = fault or {"env": []}
    async with (
        served(over_tcp(controlled)) as client,
        client.post("/api/v1/env", data=body, headers=TOKEN) as answer,
    ):
        said = await answer.json()
        assert (answer.status, said.get("code")) == (status, code)
        assert "canary" not in str(said)


async def test_values_are_asked_for_by_commands(controlled: Controlled) -> None:
    """A command reaches the daemon, and its answer comes back; also a read is a POST."""
    controlled.valued = {"key": "k", "value": [1], "version": 2}
    command = {"do": "get", "challenge_id": "c", "key": "k"}
    async with served(over_tcp(controlled)) as client:
        async with client.post("/api/v1/values", json=command, headers=TOKEN) as answer:
            assert answer.status == 200
            assert await answer.json() == controlled.valued
        async with client.get("/api/v1/values", headers=TOKEN) as answer:
            assert answer.status == 405
    assert controlled.asked == [GetValue(challenge_id=ChallengeId("c"), key="k")]


@pytest.mark.parametrize(
    ("body", "fault", "status", "code"),
    [
        (b"", None, 400, "bad_body"),
        (b'{"do": "explode"}', None, 400, "bad_body"),
        (b'{"do": "get", "challenge_id": "c"}', None, 400, "bad_body"),
        (b'{"do": "get", "challenge_id": "c", "key": "k", "x": 1}', None, 400, "bad_body"),
        (b"[" * 100_000, None, 400, "bad_body"),
        (b'{"do": "scopes"}', NotStarted("starting"), 409, "not_started"),
        (b'{"do": "scopes"}', ValueRefused("not_found", "none"), 404, "not_found"),
        (b'{"do": "scopes"}', ValueRefused("challenge_full", "full"), 422, "challenge_full"),
        (b'{"do": "scopes"}', ValueInvalid("bad_key", "no"), 422, "bad_key"),
        (b'{"do": "scopes"}', ValueUnreadable("changed"), 500, "value_unreadable"),
        (b'{"do": "scopes"}', ValueKeysUnusable("no key"), 503, "keys_unusable"),
        (b'{"do": "scopes"}', StoreUnavailable("disk full"), 503, "journal_unavailable"),
    ],
)
async def test_what_is_wrong_with_values_has_its_word(
    controlled: Controlled, body: bytes, fault: Exception | None, status: int, code: str
) -> None:
    """Bad bodies reach nobody; a refusal keeps its code."""
    controlled.valued = fault or {}
    async with (
        served(over_tcp(controlled)) as client,
        client.post("/api/v1/values", data=body, headers=TOKEN) as answer,
    ):
        assert (answer.status, (await answer.json())["code"]) == (status, code)
    assert len(controlled.asked) == (fault is not None)
