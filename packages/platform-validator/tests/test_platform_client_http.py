"""The HTTP client against a server that misbehaves in every way it can (robustness 11 to 15)."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote

import pytest
from aiohttp import web
from platform_server import KEY, Scripted, client_of, renewals_of, scripted

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_protocol.platform_messages import SubmissionRef
from platform_protocol.signing import signing_payload, verify
from platform_validator.clock import SystemClock
from platform_validator.platform_client.answers import Call, read_json, refusal
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.port import (
    AlreadyClaimed,
    JobUnknown,
    LeaseRefused,
    NotAuthorized,
    PlatformError,
    PlatformRefused,
    PlatformUnavailable,
    ResultRefused,
    SubmissionUnusable,
)
from platform_validator.platform_client.retries import retry_after
from platform_validator.platform_client.signer import RequestSigner

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CHALLENGE = ChallengeId("00000000-0000-4000-8000-000000000001")
JOB = JobId("00000000-0000-4000-8000-000000000002")
TOKEN = LeaseToken("token")


@pytest.fixture
async def server() -> AsyncIterator[Scripted]:
    async with scripted() as made:
        yield made


@pytest.fixture
async def client(server: Scripted) -> AsyncIterator[HttpPlatformClient]:
    async with client_of(server.url) as made:
        yield made


async def test_each_request_is_signed_over_what_goes_out(
    server: Scripted, client: HttpPlatformClient
) -> None:
    """Each request is signed over what goes out."""
    server.says(200, {"jobs": []})
    await client.pending_jobs([CHALLENGE, ChallengeId("a b&c")], limit=7)
    request = server.requests[0]
    payload = signing_payload(
        method="GET",
        path=request.raw_path,
        body=b"",
        timestamp_ms=int(request.headers["X-Timestamp"]),
        nonce=request.headers["X-Nonce"],
        audience=server.url,
        instance=request.headers["X-Validator-Instance"],
    )
    assert verify(KEY.address, payload, bytes.fromhex(request.headers["X-Signature"]))
    assert request.query.getall("challenge_id") == [CHALLENGE, "a b&c"]
    assert request.query["limit"] == "7"


async def test_every_try_has_its_own_nonce(server: Scripted, client: HttpPlatformClient) -> None:
    """Every try has its own nonce."""
    server.says(200, {"jobs": []})
    for _ in range(3):
        await client.pending_jobs([CHALLENGE])
    assert len({request.headers["X-Nonce"] for request in server.requests}) == 3


async def test_health_is_not_signed(server: Scripted, client: HttpPlatformClient) -> None:
    """Health is not signed."""
    server.says(200, {})
    await client.health()
    assert "X-Signature" not in server.requests[0].headers


@pytest.mark.robustness(5, "jump")
async def test_a_clock_that_is_off_is_learned_once_and_kept(
    server: Scripted, client: HttpPlatformClient
) -> None:
    """A clock that is off is learned once and kept."""
    ahead = timedelta(hours=1)

    async def strict(request: web.Request) -> web.StreamResponse:
        theirs = datetime.now(UTC) + ahead
        if abs(int(request.headers["X-Timestamp"]) / 1000 - theirs.timestamp()) > 120:
            problem = {"code": "clock_skew", "server_time": theirs.isoformat(), "status": 401}
            return web.json_response(problem, status=401)
        return web.json_response({"jobs": []})

    server.answer = strict
    await client.pending_jobs([CHALLENGE])
    assert len(server.requests) == 2
    await client.pending_jobs([CHALLENGE])
    assert len(server.requests) == 3


async def test_an_absurd_server_time_is_not_believed(server: Scripted, client: HttpPlatformClient) -> None:
    """An absurd server time is not believed."""
    server.says(401, {"code": "clock_skew", "server_time": "1999-01-01T00:00:00Z"})
    with pytest.raises(NotAuthorized):
        await client.pending_jobs([CHALLENGE])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"<html>hello</html>",
        b'{"jobs": [',
        b'{"jobs": NaN}',
        b'{"jobs": [], "jobs": []}',
        b"[" * 100_000,
        b'{"jobs":' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"jobs": 7}',
        b'"jobs"',
        b"",
        b"\xff\xfe",
    ],
)
async def test_what_is_no_answer_of_the_platform_is_unavailability(
    server: Scripted, client: HttpPlatformClient, body: bytes
) -> None:
    """What is no answer of the platform is unavailability."""
    server.says(200, body)
    with pytest.raises(PlatformUnavailable):
        await client.pending_jobs([CHALLENGE])


@pytest.mark.robustness(13, "wrong-types")
async def test_an_unreadable_entry_does_not_hide_the_others(
    server: Scripted, client: HttpPlatformClient
) -> None:
    """An unreadable entry does not hide the others."""
    good = {
        "id": JOB,
        "challenge_id": CHALLENGE,
        "created_at": "2026-01-01T00:00:00Z",
        "resources": {"cpu_cores": 1, "memory_mb": 1, "disk_mb": 1, "gpu_count": 0},
        "timeout_s": 60,
    }
    server.says(200, {"jobs": [{"id": 7}, good, {**good, "timeout_s": -1}, "x"]})
    assert [job.id for job in await client.pending_jobs([CHALLENGE])] == [JOB]


@pytest.mark.robustness(13, "ids")
@pytest.mark.parametrize(
    "odd", ["../../admin/tokens", "a/b?c=d#e", "nul\0", "😀", "%2e%2e", "x" * 10_000, "..", " "]
)
async def test_whatever_an_id_holds_it_is_one_segment_of_a_path(
    server: Scripted, client: HttpPlatformClient, odd: str
) -> None:
    """Robustness 13: ids with ../, NUL, emoji and 10 kB: no call leaves its place below /jobs/."""
    server.says(409, {"code": "already_claimed"})
    with pytest.raises(PlatformError):
        await client.claim(JobId(odd), ClaimId("claim"))
    for request in server.requests:
        _, jobs, segment, verb = request.raw_path.split("/")
        assert (jobs, unquote(segment), verb) == ("jobs", odd, "claim")


@pytest.mark.robustness(13, "200-mb")
async def test_an_endless_answer_is_cut_off(server: Scripted, client: HttpPlatformClient) -> None:
    """An endless answer is cut off."""

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            try:
                await response.write(b" " * 2**20)
            except ConnectionError:
                return response

    server.answer = endless
    with pytest.raises(PlatformUnavailable, match="larger"):
        await client.pending_jobs([CHALLENGE])


@pytest.mark.robustness(11, "redirect")
async def test_no_redirect_is_followed(server: Scripted, client: HttpPlatformClient) -> None:
    """No redirect is followed."""
    server.says(307, b"", {"Location": "http://127.0.0.1:1/steal"})
    with pytest.raises(PlatformUnavailable, match="redirect"):
        await client.claim(JOB, ClaimId("claim"))
    assert len(server.requests) == 1


@pytest.mark.robustness(11, "half-open")
async def test_silence_ends_at_the_deadline(server: Scripted) -> None:
    """Silence ends at the deadline."""
    release = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.Response()

    server.answer = silent
    client = client_of(server.url, 0.1)
    async with client:
        with pytest.raises(PlatformUnavailable, match="no answer"):
            await client.health()
    release.set()


async def test_nobody_listening_is_unavailability(server: Scripted) -> None:
    """Nobody listening is unavailability."""
    keys = RequestSigner(keypair=KEY, base_url="http://127.0.0.1:1", instance="i", clock=SystemClock())
    async with HttpPlatformClient(base_url="http://127.0.0.1:1", signer=keys, clock=SystemClock()) as client:
        with pytest.raises(PlatformUnavailable):
            await client.health()
        with pytest.raises(PlatformUnavailable):
            await anext(client.notifications())


@pytest.mark.parametrize(
    ("call", "status", "code", "kind"),
    [
        (Call.CLAIM, 409, "already_claimed", AlreadyClaimed),
        (Call.CLAIM, 409, "job_cancelled", LeaseRefused),
        (Call.CLAIM, 404, "job_not_found", JobUnknown),
        (Call.LEASE, 409, "lease_lost", LeaseRefused),
        (Call.LEASE, 409, "attempt_expired", LeaseRefused),
        (Call.LEASE, 404, "job_not_found", JobUnknown),
        (Call.RESULT, 409, "lease_lost", LeaseRefused),
        (Call.RESULT, 422, "invalid_result", ResultRefused),
        (Call.RESULT, 410, "gone", LeaseRefused),
        (Call.RESULT, 404, "", PlatformUnavailable),
        (Call.LEASE, 409, "", PlatformUnavailable),
        (Call.LEASE, 401, "", NotAuthorized),
        (Call.PLAIN, 403, "not_registered", NotAuthorized),
        (Call.PLAIN, 403, "no_lease", PlatformRefused),
        (Call.PLAIN, 429, "slow_down", PlatformUnavailable),
        (Call.RESULT, 500, "internal", PlatformUnavailable),
        (Call.RESULT, 503, "", PlatformUnavailable),
        (Call.RESULT, 301, "", PlatformUnavailable),
        (Call.PLAIN, 418, "teapot", PlatformRefused),
    ],
)
def test_which_error_an_answer_is(call: Call, status: int, code: str, kind: type[PlatformError]) -> None:
    """Which error an answer is."""
    body = json.dumps({"code": code, "detail": "why"}).encode() if code else b"<html>"
    assert type(refusal(call, status, {}, body, NOW)) is kind


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("7", 7),
        ("0", 0),
        ("99999999999999999999", 3600),
        ("-5", None),
        ("soon", None),
        ("Thu, 01 Jan 2026 00:00:30 GMT", 30),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 3600),
    ],
)
@pytest.mark.robustness(12, "retry-after")
def test_retry_after_in_both_forms(value: str | None, seconds: int | None) -> None:
    """Retry after in both forms."""
    asked = retry_after(value, NOW)
    assert asked == (None if seconds is None else timedelta(seconds=seconds))


def test_json_strings_that_look_nested_are_not() -> None:
    """Json strings that look nested are not."""
    text = json.dumps({"a": "[" * 1000 + '\\"{' * 10, "b": [1]})
    assert read_json(text.encode())["b"] == [1]


@pytest.mark.robustness(11, "redirect")
async def test_a_submission_goes_nowhere_but_home(
    server: Scripted, client: HttpPlatformClient, tmp_path: Path
) -> None:
    """A submission goes nowhere but home."""
    data = b"x" * 1000
    server.says(200, data)
    digest = hashlib.sha256(data).hexdigest()

    def reference(url: str, size: int = 1000, sha256: str = digest) -> SubmissionRef:
        return SubmissionRef(url=url, sha256=sha256, size=size, filename="../../etc/passwd")

    target = tmp_path / "submission"
    await client.fetch_submission(reference("/submissions/1/bundle"), target)
    assert target.read_bytes() == data
    await client.fetch_submission(reference(f"{server.url}/submissions/1/bundle?x=1"), target)
    bad = tmp_path / "bad"
    for wrong in (
        reference("//127.0.0.1:1/x"),
        reference("http://localhost:1/x"),
        reference("/x y"),
        reference("/ok", size=999),
        reference("/ok", size=1001),
        reference("/ok", sha256="0" * 64),
        reference("/ok", size=2**40),
    ):
        with pytest.raises(SubmissionUnusable):
            await client.fetch_submission(wrong, bad)
    assert names_in(tmp_path) == [target.name]


def names_in(folder: Path) -> list[str]:
    """What a folder holds."""
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.robustness(11, "reset")
async def test_a_submission_that_breaks_off_leaves_nothing(
    server: Scripted, client: HttpPlatformClient, tmp_path: Path
) -> None:
    """A submission that breaks off leaves nothing."""

    async def breaking(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x" * 10)
        assert request.transport is not None
        request.transport.abort()
        return response

    server.answer = breaking
    with pytest.raises(PlatformUnavailable):
        await client.fetch_submission(
            SubmissionRef(url="/x", sha256="0" * 64, size=1000, filename="f"), tmp_path / "bad"
        )
    assert names_in(tmp_path) == []


async def test_a_blocking_renewal_speaks_as_the_client_does(server: Scripted) -> None:
    """A blocking renewal speaks as the client does."""
    renewals = renewals_of(server.url)
    server.says(200, {"term_s": 90.0})
    assert await asyncio.to_thread(renewals.renew, JOB, TOKEN) == timedelta(seconds=90)
    assert server.requests[0].path == f"/jobs/{JOB}/renew"
    assert json.loads(server.bodies[0]) == {"lease_token": TOKEN}
    server.says(409, {"code": "job_cancelled"})
    with pytest.raises(LeaseRefused) as caught:
        await asyncio.to_thread(renewals.renew, JOB, TOKEN)
    assert caught.value.code == "job_cancelled"
    for status, body in ((200, b"<html>"), (200, b'{"term_s": -1}'), (503, b""), (302, b"")):
        server.says(status, body)
        with pytest.raises(PlatformUnavailable):
            await asyncio.to_thread(renewals.renew, JOB, TOKEN)


@pytest.mark.robustness(11, "one-byte")
def test_a_renewal_answered_byte_by_byte_ends_at_its_deadline() -> None:
    """A renewal answered byte by byte ends at its deadline: each byte is in time, all of them are not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        renewals = renewals_of(url, 0.5)

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\n" + b"X-Long: 1\r\n" * 1000:
                    connection.sendall(bytes([byte]))
                    stopped.wait(0.02)

        stopped = threading.Event()
        dripping = threading.Thread(target=drip)
        dripping.start()
        began = time.monotonic()
        with pytest.raises(PlatformUnavailable):
            renewals.renew(JOB, TOKEN)
        assert time.monotonic() - began < 5
        stopped.set()
        dripping.join(10)
        assert not dripping.is_alive()


def test_a_blocking_renewal_without_a_server_is_unanswered() -> None:
    """A blocking renewal without a server is unanswered."""
    renewals = renewals_of("http://127.0.0.1:1")
    with pytest.raises(PlatformUnavailable):
        renewals.renew(JOB, TOKEN)
