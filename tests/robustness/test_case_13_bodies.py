"""Answers that are none of the Platform API's, to every call that reads one; and ids that are no ids."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from aiohttp import web
from job_house import CHALLENGE, TOML, House, new_commit
from platform_server import Scripted, client_of, renewals_of, scripted

from platform_protocol.ids import ClaimId, JobId, LeaseToken
from platform_validator.platform_client.answers import MAX_BODY
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.port import PlatformUnavailable
from platform_validator.store.records import InstanceState

JOB, TOKEN = JobId("00000000-0000-4000-8000-000000000002"), LeaseToken("token")
RESOURCES = {"cpu_cores": 1, "memory_mb": 1, "disk_mb": 1, "gpu_count": 0}
PENDING = {
    "id": JOB,
    "challenge_id": CHALLENGE,
    "created_at": "2026-01-01T00:00:00Z",
    "resources": RESOURCES,
    "timeout_s": 60,
}
CLAIM = {
    "id": JOB,
    "challenge_id": CHALLENGE,
    "attempt": 1,
    "lease": {"token": TOKEN, "term_s": 120.0},
    "timeout_s": 60,
    "resources": RESOURCES,
}


@pytest.fixture
async def server() -> AsyncIterator[Scripted]:
    async with scripted() as made:
        yield made


@pytest.fixture
async def client(server: Scripted) -> AsyncIterator[HttpPlatformClient]:
    async with client_of(server.url) as made:
        yield made


def calls(server: Scripted, client: HttpPlatformClient) -> list[Callable[[], Awaitable[object]]]:
    """Every call whose answer is read."""
    return [
        client.active_challenges,
        lambda: client.pending_jobs([CHALLENGE]),
        lambda: client.claim(JOB, ClaimId("claim")),
        lambda: asyncio.to_thread(renewals_of(server.url).renew, JOB, TOKEN),
        lambda: client.renew(JOB, TOKEN),
    ]


def each(text: str) -> bytes:
    """One body that every call would read something of."""
    return f'{{"challenges": {text}, "jobs": {text}, "id": {text}, "term_s": {text}}}'.encode()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"<!doctype html><h1>Welcome</h1>", marks=pytest.mark.robustness(13, "html"), id="html"),
        pytest.param(b'{"jobs": [{"id', marks=pytest.mark.robustness(13, "truncated"), id="truncated"),
        pytest.param(b"", marks=pytest.mark.robustness(13, "truncated"), id="empty"),
        pytest.param(b"[" * 10**5, marks=pytest.mark.robustness(13, "nesting"), id="deep-open"),
        pytest.param(
            each("[" * 10**5 + "]" * 10**5), marks=pytest.mark.robustness(13, "nesting"), id="deep-list"
        ),
        pytest.param(
            each('{"a":' * 10**5 + "1" + "}" * 10**5),
            marks=pytest.mark.robustness(13, "nesting"),
            id="deep-object",
        ),
        pytest.param(each("NaN"), marks=pytest.mark.robustness(13, "nan"), id="nan"),
        pytest.param(each("-Infinity"), marks=pytest.mark.robustness(13, "nan"), id="infinity"),
        pytest.param(each("1e999"), marks=pytest.mark.robustness(13, "nan"), id="overflow"),
        pytest.param(
            b'{"term_s": 9, "term_s": 9, "jobs": [], "jobs": [], "challenges": [], "challenges": []}',
            marks=pytest.mark.robustness(13, "duplicate-keys"),
            id="duplicate-keys",
        ),
        pytest.param(each("true"), marks=pytest.mark.robustness(13, "wrong-types"), id="booleans"),
        pytest.param(each('"7 apples"'), marks=pytest.mark.robustness(13, "wrong-types"), id="strings"),
        pytest.param(each("null"), marks=pytest.mark.robustness(13, "wrong-types"), id="nulls"),
        pytest.param(each("9" * 5000), marks=pytest.mark.robustness(13, "wrong-types"), id="a-long-number"),
        pytest.param(b"[]", marks=pytest.mark.robustness(13, "wrong-types"), id="a-list"),
        pytest.param(b"\xff\xfe\x00", marks=pytest.mark.robustness(13, "wrong-types"), id="no-utf-8"),
    ],
)
async def test_a_body_that_is_no_answer_is_silence(
    server: Scripted, client: HttpPlatformClient, body: bytes
) -> None:
    """In a 200, to whichever call: nothing of it is believed, and the call may be made again."""
    server.says(200, body)
    for call in calls(server, client):
        with pytest.raises(PlatformUnavailable):
            await call()


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.robustness(13, "200-mb")
async def test_200_megabytes_are_not_held(
    server: Scripted, client: HttpPlatformClient, declared: bool
) -> None:
    """With a Content-Length or in chunks: no more is read than an answer may have, nor kept in memory."""
    sent = 0

    async def large(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Length": str(200 * 2**20)} if declared else {})
        await response.prepare(request)
        piece = b" " * 2**20
        for _ in range(200):
            try:
                await response.write(piece)
            except ConnectionError:
                break
            sent += len(piece)
        return response

    server.answer = large
    tracemalloc.start()
    try:
        for call in (calls(server, client)[0], calls(server, client)[2]):
            with pytest.raises(PlatformUnavailable, match="larger"):
                await call()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent < 100 * 2**20
    assert most < 5 * MAX_BODY
    with pytest.raises(PlatformUnavailable):
        await calls(server, client)[3]()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"lease": {"token": 7, "term_s": 120}}, "no Claim"),
        ({"lease": {"token": TOKEN, "term_s": 0}}, "no Claim"),
        ({"lease": {"token": TOKEN, "term_s": -1}}, "no Claim"),
        ({"attempt": 0}, "no Claim"),
        ({"attempt": "first"}, "no Claim"),
        ({"timeout_s": 0}, "no Claim"),
        ({"resources": {**RESOURCES, "cpu_cores": -1}}, "no Claim"),
        ({"payload": []}, "no Claim"),
        ({"submission": {"url": "/x", "sha256": "zz", "size": 1, "filename": "f"}}, "no Claim"),
        ({"submission": {"url": "/x", "sha256": "0" * 64, "size": -1, "filename": "f"}}, "no Claim"),
        ({"id": "00000000-0000-4000-8000-000000000009"}, "another one"),
    ],
)
@pytest.mark.robustness(13, "wrong-types")
async def test_a_claim_that_cannot_be_right_is_no_claim(
    server: Scripted, client: HttpPlatformClient, body: dict[str, Any], message: str
) -> None:
    """Also one of another job's; the same with everything in its place is one."""
    server.says(200, {**CLAIM, **body})
    with pytest.raises(PlatformUnavailable, match=message):
        await client.claim(JOB, ClaimId("claim"))
    server.says(200, CLAIM)
    assert (await client.claim(JOB, ClaimId("claim"))).attempt == 1


@pytest.mark.robustness(13, "unknown-enum")
async def test_words_of_a_newer_server_hide_nothing(server: Scripted, client: HttpPlatformClient) -> None:
    """A status, a field, a notification and a problem code that this version does not know."""
    server.says(200, {"jobs": [{**PENDING, "status": "resurrected", "flavour": "new"}], "next": "page"})
    assert [job.id for job in await client.pending_jobs([CHALLENGE])] == [JOB]
    server.says(200, {**CLAIM, "status": "half_claimed"})
    assert (await client.claim(JOB, ClaimId("claim"))).id == JOB
    server.sends(
        ['{"type": "weather", "seq": 1}', json.dumps({"type": "job_cancelled", "seq": 2, "job_id": JOB})]
    )
    assert [hint.type async for hint in client.notifications()] == ["weather", "job_cancelled"]


IDS = [
    "../../admin/tokens",
    "..",
    ".",
    "/etc/passwd",
    "a\x00b",
    "😀" * 3,
    "x" * 10_000,
    "a?b#c",
    "",
    "a\r\nX-Evil: 1",
]


@pytest.mark.parametrize("job_id", IDS, ids=lambda each: ascii(each)[:20])
@pytest.mark.robustness(13, "ids")
async def test_an_id_stays_one_segment_of_the_path(
    server: Scripted, client: HttpPlatformClient, job_id: str
) -> None:
    """Whatever is in it: what was signed arrives, under `/jobs/`, and leads to no other resource."""
    server.says(200, {**CLAIM, "id": job_id})
    try:
        await client.claim(JobId(job_id), ClaimId("claim"))
    except PlatformUnavailable:
        assert server.requests == [], "refused here, or by the server's own limits"
        return
    [request] = server.requests
    begin, segment, end = request.raw_path.rsplit("/", 2)
    assert (begin, unquote(segment), end) == ("/jobs", job_id, "claim")
    assert "X-Evil" not in request.headers


@pytest.mark.parametrize("job_id", [each for each in IDS if each], ids=lambda each: ascii(each)[:20])
@pytest.mark.robustness(13, "ids")
async def test_a_job_with_such_an_id_harms_no_file_and_no_other_job(tmp_path: Path, job_id: str) -> None:
    """It runs like any other, or is refused; no path is made of its id, nor of its challenge's."""
    house = House(tmp_path)
    house.publish(new_commit(tmp_path, TOML))
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        good = house.platform.add_job(CHALLENGE, submission=b"code")
        evil = house.platform.jobs.pop(house.platform.add_job(CHALLENGE, submission=b"code"))
        evil.id = JobId(job_id)
        house.platform.jobs[evil.id] = evil
        await house.ended(good)
        await house.ended(evil.id)
    assert {house.platform.jobs[each].outcome for each in (good, evil.id)} == {"succeeded"}
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "repository"}
