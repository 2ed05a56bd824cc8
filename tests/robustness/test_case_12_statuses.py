"""Every status that a server or a proxy in between may answer with, on the wire."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from platform_server import Scripted, client_of, renewals_of, scripted
from tests.daemon.world import CHALLENGE, World, play, until

from platform_protocol.ids import ChallengeId, ClaimId, JobId, LeaseToken
from platform_protocol.platform_messages import ReleaseReason
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.port import NotAuthorized, PlatformError, PlatformUnavailable
from platform_validator.platform_client.retries import TABLE, Again, Kind, decide
from platform_validator.store.records import JobOutcome, JobRecord

JOB, TOKEN = JobId("00000000-0000-4000-8000-000000000002"), LeaseToken("token")
RNG = random.Random(5)
UNAUTHORIZED = NotAuthorized("401 bad_signature", code="bad_signature", status=401)


@pytest.fixture
async def server() -> AsyncIterator[Scripted]:
    async with scripted() as made:
        yield made


@pytest.fixture
async def client(server: Scripted) -> AsyncIterator[HttpPlatformClient]:
    async with client_of(server.url) as made:
        yield made


async def failure(client: HttpPlatformClient, server: Scripted, kind: Kind) -> PlatformError:
    """What a call of this kind raises."""
    calls: dict[Kind, Callable[[], Awaitable[object]]] = {
        Kind.LIST: lambda: client.pending_jobs([ChallengeId("c")]),
        Kind.CLAIM: lambda: client.claim(JOB, ClaimId("claim")),
        Kind.RENEWAL: lambda: asyncio.to_thread(renewals_of(server.url).renew, JOB, TOKEN),
        Kind.RELEASE: lambda: client.release(JOB, TOKEN, ReleaseReason.DRAIN),
        Kind.RESULT: lambda: client.submit_result(JOB, b"{}"),
        Kind.PUSH: lambda: anext(client.notifications()),
    }
    with pytest.raises(PlatformError) as caught:
        await calls[kind]()
    return caught.value


CALLS = [Kind.LIST, Kind.CLAIM, Kind.RENEWAL, Kind.RELEASE, Kind.RESULT, Kind.PUSH]


@pytest.mark.parametrize("body", [b'{"code": "internal", "detail": "why"}', b"<html>bad gateway</html>"])
@pytest.mark.parametrize("status", [500, 502, 503, 429])
@pytest.mark.robustness(12, "5xx", "429")
async def test_what_is_no_answer_is_asked_again(
    server: Scripted, client: HttpPlatformClient, status: int, body: bytes
) -> None:
    """By every call, whether the server said why or a proxy sent its page; one try a call."""
    server.says(status, body)
    for number, kind in enumerate(CALLS, 1):
        error = await failure(client, server, kind)
        assert type(error) is PlatformUnavailable
        assert isinstance(decide(kind, error, failures=1, waited=0.0, rng=RNG), Again)
        assert len(server.requests) == number


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7.0, 7.0),
        ("date", 25.0, 30.0),
        ("86400", 3600.0, 3600.0),
        ("9" * 400, 3600.0, 3600.0),
        ("Fri, 01 Jan 9999 00:00:00 GMT", 3600.0, 3600.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0, 0.0),
        ("-5", None, None),
        ("tomorrow", None, None),
        ("Fri, 99 Foo 2026 99:99:99 GMT", None, None),
        ("\u0667", None, None),
        ("", None, None),
    ],
    ids=str,
)
@pytest.mark.robustness(12, "retry-after")
async def test_how_long_it_wants_to_be_left_alone(
    server: Scripted, client: HttpPlatformClient, value: str, least: float | None, most: float | None
) -> None:
    """In seconds or as a date; the wait is at least that long and at most the longest of the call's row."""
    if value == "date":
        value = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server.says(503, b"", {"Retry-After": value})
    for kind in CALLS:
        error = await failure(client, server, kind)
        assert isinstance(error, PlatformUnavailable)
        asked = error.retry_after
        assert (asked is None) == (least is None)
        if asked is not None and least is not None and most is not None:
            assert least <= asked.total_seconds() <= most
        cap = TABLE[kind].pause.cap.total_seconds()
        step = decide(kind, error, failures=1, waited=0.0, rng=RNG)
        assert isinstance(step, Again)
        assert min(least or 0.0, cap) <= step.after <= cap


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.robustness(12, "301")
async def test_a_redirected_result_was_not_answered(
    server: Scripted, client: HttpPlatformClient, status: int
) -> None:
    """It is not sent elsewhere, and stays in the outbox."""
    server.says(status, {"code": "lease_lost"}, {"Location": f"{server.url}/elsewhere"})
    error = await failure(client, server, Kind.RESULT)
    assert isinstance(decide(Kind.RESULT, error, failures=1, waited=0.0, rng=RNG), Again)
    assert [request.path for request in server.requests] == [f"/jobs/{JOB}/results"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "job_not_found"), (409, "lease_lost"), (410, "gone"), (413, "too_large"), (422, "invalid_result")],
)
@pytest.mark.robustness(12, "result-refused")
async def test_a_refused_result_is_over_when_the_platform_api_says_so(
    server: Scripted, client: HttpPlatformClient, status: int, code: str
) -> None:
    """With its problem code; the same status from somebody in between decides nothing."""
    server.says(status, {"code": code, "detail": "why"})
    step = decide(Kind.RESULT, await failure(client, server, Kind.RESULT), failures=1, waited=0.0, rng=RNG)
    assert step.code == code  # type: ignore[union-attr] # an Again has no code: the test fails
    server.says(status, b"<html>not found</html>")
    error = await failure(client, server, Kind.RESULT)
    assert isinstance(decide(Kind.RESULT, error, failures=10_000, waited=0.0, rng=RNG), Again)


async def ended(world: World, job_id: JobId) -> JobRecord:
    """The journal's record of a job that came to its end."""
    while True:
        for record in await world.store.recent_jobs(10):
            if record.job_id == job_id and record.outcome is not None:
                return record
        await asyncio.sleep(1)


@pytest.mark.robustness(12, "401")
def test_a_401_now_and_then_loses_nothing(tmp_path: Path) -> None:
    """Once at every call of a job's life: a clock that was set, a replica without the newest key."""

    async def story(world: World) -> None:
        platform = world.platform
        platform.term = timedelta(minutes=2)
        for call in ("active_challenges", "pending_jobs", "claim", "renew", "submit_result", "notifications"):
            platform.fail_next(call, UNAUTHORIZED)
        engine = world.engine()
        running = asyncio.create_task(engine.run())
        await until(lambda: bool(engine.parts.challenges.active_ids()))
        job_id = platform.add_job(CHALLENGE, timeout_s=3600)
        await world.guests.running.wait()
        await asyncio.sleep(120)
        world.guests.may_finish.set()
        await until(lambda: platform.jobs[job_id].finished)
        assert (platform.jobs[job_id].status, platform.jobs[job_id].attempt) == ("completed", 1)
        assert platform._faults == {call: [] for call in platform._faults}, "each was struck"
        engine.drain("the story is over")
        await running

    play(story, tmp_path)


@pytest.mark.robustness(12, "403")
def test_a_403_for_good_keeps_results_and_claims_nothing(tmp_path: Path) -> None:
    """The registration is gone while a result waits: it is kept for as long as that lasts."""

    async def story(world: World) -> None:
        platform = world.platform
        engine = world.engine()
        running = asyncio.create_task(engine.run())
        await until(lambda: bool(engine.parts.challenges.active_ids()))
        job_id = platform.add_job(CHALLENGE, timeout_s=3600)
        await world.guests.running.wait()
        platform.banned.add("validator-1")
        other = platform.add_job(CHALLENGE)
        world.guests.may_finish.set()
        await until(lambda: engine.parts.outbox.depth == 1)
        await asyncio.sleep(3 * 3600)
        assert [entry.job_id for entry in await world.store.outbox()] == [job_id]
        assert platform.jobs[other].attempt == 0
        assert "403" in str(engine.parts.jobs.last_error)
        platform.banned.clear()
        await until(lambda: platform.jobs[job_id].finished and platform.jobs[other].finished)
        assert platform.jobs[job_id].status == platform.jobs[other].status == "completed"
        engine.drain("the story is over")
        await running

    play(story, tmp_path)


@pytest.mark.robustness(12, "403")
def test_a_claim_that_is_forbidden_is_given_up(tmp_path: Path) -> None:
    """After a few tries its slot and its share of the quota serve others."""

    async def story(world: World) -> None:
        platform = world.platform
        engine = world.engine()
        running = asyncio.create_task(engine.run())
        await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
        for _ in range(4):
            platform.fail_next("claim", NotAuthorized("403", code="not_registered", status=403))
        job_id = platform.add_job(CHALLENGE)
        record = await ended(world, job_id)
        assert (record.outcome, record.reason) == (JobOutcome.CANCELLED, "not_registered")
        world.guests.may_finish.set()
        await until(lambda: platform.jobs[job_id].finished)
        engine.drain("the story is over")
        await running

    play(story, tmp_path)
