"""Several jobs at once over one real session, as in `shared` mode: the validator's end against the SDK's."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from platform_challenge_sdk import Challenge, Context
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.held_jobs import HeldJobs
from platform_challenge_sdk.serve import ChallengeServer
from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmName
from platform_protocol.session.messages import ValuesRequest, ValuesResult
from platform_protocol.session.v2 import Offer
from platform_protocol.user_config import UserConfig
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.errors import SessionLost, SessionRefused
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.session import CvmSession

SECRET, VM = b"s" * 32, VmName("pv-0123456789-shared")
SESSION = "33333333-3333-4333-8333-333333333333"
CHALLENGE = ChallengeId("11111111-1111-4111-8111-111111111111")
SEATS = 3


class NoValues:
    """Nobody asks for any."""

    async def answer(
        self, challenge_id: ChallengeId, session_id: str, request: ValuesRequest
    ) -> ValuesResult:
        raise AssertionError(request)


async def accept(offer: Offer) -> None:
    """Below Tee the launch secret authenticates."""


@dataclass
class Guest:
    """A challenge whose jobs end when they are let, each by its number."""

    port: int
    server: ChallengeServer
    end: Callable[[], None]
    start_again: Callable[[], None]
    may_end: dict[int, asyncio.Event] = field(default_factory=dict)

    def event(self, number: int) -> asyncio.Event:
        """Lets a job end."""
        return self.may_end.setdefault(number, asyncio.Event())

    @contextlib.asynccontextmanager
    async def session(self, *, resume: bool = False, patience: float = 5) -> AsyncIterator[CvmSession]:
        """One validator's end; so many seconds it dials a CVM that does not answer."""
        session = CvmSession(
            Callee(("127.0.0.1", self.port), VM, SECRET, SESSION, Hotkey("5DD")),
            challenge_id=CHALLENGE,
            env={},
            judge=accept,
            values=NoValues(),
            pace=SessionPace(resume_for=patience, retry=0.01, retry_most=0.05),
            resume=resume,
        )
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            tasks.create_task(session.run())
            await session.ready()
            try:
                yield session
            finally:
                session.close()

    async def drop(self) -> None:
        """The connection breaks."""
        live = self.server._live
        assert live is not None
        live.transport.abort()

    async def ended(self) -> None:
        """Wait until nothing serves any more."""
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except ConnectionRefusedError:
                return
            writer.close()
            await asyncio.sleep(0.005)

    async def running(self, jobs: int) -> None:
        """Wait until so many run."""
        await until(lambda: self.server.jobs.running == jobs)


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    """Serves, with three seats."""
    challenge = Challenge()

    @challenge.on_job()
    async def handle(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
        number = payload["number"]
        ctx.log.info(payload["says"])
        ctx.progress(number, "begun")
        await found.event(number).wait()
        size = (ctx.submission.path / "submission").stat().st_size if payload["submitted"] else 0
        return {"score": float(number), "attempt": ctx.job.attempt, "size": size}

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = UserConfig(
        vm=VM,
        launch_secret=UserConfig.encode_secret(SECRET),
        validator_base_url="http://127.0.0.1:1",
        proxy_url=None,
        max_lifetime_s=60,
        hard_lifetime_s=60,
    )
    stops: list[asyncio.Event] = []

    def serve() -> ChallengeServer:
        held = HeldJobs(per_job=False, concurrency=SEATS)
        server = ChallengeServer(challenge, config, Health("ready"), jobs=held, scratch=tmp_path)
        stops.append(asyncio.Event())
        tasks.create_task(server.serve("127.0.0.1", port, stops[-1]))
        return server

    def again() -> None:
        serve()

    def end() -> None:
        stops[-1].set()

    async with asyncio.TaskGroup() as tasks:
        found = Guest(port, serve(), end, again)
        yield found
        found.end()


def job_of(number: int) -> JobId:
    """The id of a job."""
    return JobId(f"22222222-2222-4222-8222-{number:012d}")


async def run(
    session: CvmSession,
    number: int,
    *,
    submission: Path | None = None,
    attempt: int = 1,
    told: Callable[[int, str], None] = lambda _number, _what: None,
) -> GuestResult:
    """Have a job run."""
    digest = None if submission is None else hashlib.sha256(submission.read_bytes()).hexdigest()
    payload = {"number": number, "says": f"job {number}", "submitted": submission is not None}
    order = JobOrder(job_of(number), attempt, CHALLENGE, None, payload, digest)
    return await session.execute(
        order,
        submission,
        on_started=lambda already: told(number, "had" if already else "given"),
        on_progress=lambda percent, _message: told(number, f"{percent:.0f}"),
        on_log=lambda _level, message: told(number, message),
    )


async def test_jobs_at_once_keep_apart_across_a_dropped_connection(guest: Guest, tmp_path: Path) -> None:
    """Each has its own submission, log, progress and result; the connection breaks in the middle."""
    seen: dict[int, list[str]] = {1: [], 2: [], 3: []}
    files = {}
    for number in seen:
        files[number] = tmp_path / f"submission-{number}"
        files[number].write_bytes(os.urandom(number * 1024 * 1024 + number))
    async with guest.session() as session, asyncio.TaskGroup() as tasks:
        jobs = {
            number: tasks.create_task(
                run(session, number, submission=files[number], told=lambda n, what: seen[n].append(what))
            )
            for number in seen
        }
        while not any(guest.server.jobs.state(configured=True).jobs or ()):
            await asyncio.sleep(0)  # seen at the first turn of the loop, while submissions are on their way
        await guest.drop()
        await guest.running(3)
        await until(lambda: all(f"job {number}" in seen[number] for number in seen))
        await guest.drop()
        for number in (3, 1, 2):
            guest.event(number).set()
    for number, job in jobs.items():
        result = job.result()
        assert result.error is None
        assert result.result == {"score": float(number), "attempt": 1, "size": number * 1024 * 1024 + number}
        assert f"job {number}" in seen[number]
        assert not any(f"job {other}" in seen[number] for other in seen if other != number)


async def test_a_job_beyond_the_seats_is_refused_and_harms_no_other(guest: Guest) -> None:
    """The SDK names the job that it refuses."""
    async with guest.session() as session, asyncio.TaskGroup() as tasks:
        jobs = [tasks.create_task(run(session, number)) for number in range(1, SEATS + 1)]
        await guest.running(SEATS)
        with pytest.raises(SessionRefused, match="busy"):
            await run(session, 9)
        for number in range(1, SEATS + 1):
            guest.event(number).set()
    results = [job.result().result or {} for job in jobs]
    assert [each["score"] for each in results] == [1.0, 2.0, 3.0]


async def test_a_cancellation_that_was_lost_is_made_up_for(guest: Guest) -> None:
    """After the resume the SDK runs nothing that nobody waits for."""
    async with guest.session() as session, asyncio.TaskGroup() as tasks:
        forgotten, kept = (tasks.create_task(run(session, number)) for number in (1, 2))
        await guest.running(2)
        forgotten.cancel()
        await guest.drop()
        await guest.running(1)
        guest.event(2).set()
        result = await kept
    assert result.result is not None
    assert result.result["score"] == 2.0


async def test_a_late_end_of_an_earlier_attempt_is_not_taken_for_the_later_one(guest: Guest) -> None:
    """One CVM is given both: each result names its attempt."""
    async with guest.session() as session:
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(run(session, 1))
            await guest.running(1)
            first.cancel()
        await session.cancel(job_of(1), "lease_lost")
        guest.event(1).set()
        result = await run(session, 1, attempt=2)
    assert result.error is None
    assert (result.attempt, result.result) == (2, {"score": 1.0, "attempt": 2, "size": 0})


async def test_a_later_process_collects_all_jobs_of_a_session(guest: Guest) -> None:
    """One that ended while nobody was there, one that ended before anybody asked, one that still runs."""
    async with guest.session() as session:
        with contextlib.suppress(asyncio.CancelledError):
            async with asyncio.TaskGroup() as tasks:
                jobs = [tasks.create_task(run(session, number)) for number in (1, 2, 3)]
                await guest.running(3)
                for job in jobs:
                    job.cancel()
    guest.event(1).set()
    await guest.running(2)
    told: list[tuple[int, str]] = []
    async with guest.session(resume=True) as session:
        guest.event(2).set()
        await guest.running(1)
        # The results of 1 and 2 are here before anybody asks for them.
        await session.confirm()
        results = [await _collected(session, number, guest, told) for number in (3, 2, 1)]
    assert [each.result["score"] for each in results if each.result] == [3.0, 2.0, 1.0]
    assert {number for number, what in told if what == "had"} == {1, 2, 3}


async def _collected(
    session: CvmSession, number: int, guest: Guest, told: list[tuple[int, str]]
) -> GuestResult:
    guest.event(number).set()
    result = await run(session, number, told=lambda n, what: told.append((n, what)))
    await session.acknowledge(result)
    return result


async def test_a_guest_that_ends_is_noticed_while_nobody_uses_it(guest: Guest) -> None:
    """An idle CVM that exits: its session is lost, and says so."""
    async with guest.session(patience=0.2) as session:
        lost = asyncio.ensure_future(session.lost())
        guest.end()
        async with asyncio.timeout(20):
            error = await lost
    assert isinstance(error, SessionLost)
    assert "cannot be reached any more" in str(error)


async def test_a_guest_that_was_started_anew_is_noticed_while_nobody_uses_it(guest: Guest) -> None:
    """Dstack restarts a VM that exited by itself: it answers again, and does not know the session."""
    async with guest.session() as session:
        lost = asyncio.ensure_future(session.lost())
        guest.end()
        await guest.ended()
        guest.start_again()
        async with asyncio.timeout(20):
            error = await lost
    assert isinstance(error, SessionLost)
    assert "rebooted" in str(error)
