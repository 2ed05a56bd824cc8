"""Drain, cancel and reload over HTTP, on real sockets: answers, and who may ask."""

from __future__ import annotations

import pytest
from controlled import JOB, TOKEN, Controlled, over_tcp, served

from platform_validator.attestation.os_image import Shape
from platform_validator.cvm.hosts import UnknownHost
from platform_validator.cvm.vmm import VmmUnavailable
from platform_validator.store.port import StoreUnavailable
from platform_validator.web.control import Cancelling, NotStarted, PinBusy, Reloaded
from platform_validator.web.operators import operators_app

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


@pytest.fixture
def controlled() -> Controlled:
    return Controlled()


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
