"""Each row of the table of retries (docs/architecture.md) as the running engine keeps it, on virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from tests.daemon.world import CHALLENGE, World, begun, play, until

from platform_protocol.ids import JobId
from platform_validator.daemon.engine import Engine
from platform_validator.jobs.manager import NOT_GRANTED_FOR
from platform_validator.platform_client.memory import Fault
from platform_validator.platform_client.port import (
    HotkeyInUse,
    LeaseRefused,
    NotAuthorized,
    PlatformError,
    PlatformRefused,
    PlatformUnavailable,
    ResultRefused,
)
from platform_validator.platform_client.retries import TABLE, Kind
from platform_validator.store.records import JobOutcome, JobRecord

DOWN = PlatformUnavailable("503")
BUSY = PlatformUnavailable("503", retry_after=timedelta(hours=1))
FORBIDDEN = NotAuthorized("403", code="not_registered", status=403)
TEAPOT = PlatformRefused("418", code="teapot", status=418)


@dataclass
class Failing:
    """A call that fails in one way until it is mended; when it was tried, in virtual seconds."""

    world: World
    call: str
    error: PlatformError | None = None
    tries: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        entered = self.world.platform.enter

        def enter(call: str, hotkey: str) -> list[Fault]:
            if call == self.call:
                self.tries.append(asyncio.get_running_loop().time())
                if self.error is not None:
                    raise self.error
            return entered(call, hotkey)

        self.world.platform.enter = enter  # type: ignore[method-assign] # the world's own server

    @property
    def pauses(self) -> list[float]:
        """Seconds between two tries."""
        return [later - earlier for earlier, later in pairwise(self.tries)]


async def idle(world: World) -> tuple[Engine, asyncio.Task[object]]:
    """An engine whose challenge is Active, with nothing to do."""
    engine = world.engine()
    running: asyncio.Task[object] = asyncio.ensure_future(engine.run())
    await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
    return engine, running


async def ended(world: World, job_id: JobId) -> JobRecord:
    """The journal's record of the first of its claims that came to an end; the job may be claimed anew."""
    async with asyncio.timeout(4 * 3600):
        while True:
            for record in reversed(await world.store.recent_jobs(1000)):
                if record.job_id == job_id and record.outcome is not None:
                    return record
            await asyncio.sleep(0.5)


async def over(engine: Engine, running: asyncio.Task[object]) -> None:
    """Drained, in haste."""
    engine.drain("the story is over")
    engine.drain("the story is over")
    await running


@pytest.mark.parametrize("error", [DOWN, FORBIDDEN], ids=["503", "403"])
@pytest.mark.parametrize("call", ["pending_jobs", "active_challenges"])
def test_lists_are_asked_for_again_for_ever(tmp_path: Path, call: str, error: PlatformError) -> None:
    """At the pace of the poll, and the daemon goes on as soon as they come."""

    async def story(world: World) -> None:
        engine, running = await idle(world)
        failing = Failing(world, call, error)
        await asyncio.sleep(1800)
        assert len(failing.tries) > 200
        assert all(4.0 <= pause <= 20.0 for pause in failing.pauses[2:])
        failing.error = None
        world.guests.may_finish.set()
        job_id = world.platform.add_job(CHALLENGE)
        await until(lambda: world.platform.jobs[job_id].finished)
        await over(engine, running)

    play(story, tmp_path)


@pytest.mark.parametrize("call", ["pending_jobs", "active_challenges"])
@pytest.mark.robustness(12, "retry-after")
def test_lists_wait_as_long_as_they_are_told_to_up_to_their_cap(tmp_path: Path, call: str) -> None:
    """Pushes wait as well."""

    async def story(world: World) -> None:
        engine, running = await idle(world)
        failing = Failing(world, call, BUSY)
        for _ in range(600):
            await asyncio.sleep(1)
            engine.poll_now()
        cap = TABLE[Kind.LIST].pause.cap.total_seconds()
        assert len(failing.tries) > 20
        assert all(pause == pytest.approx(cap, abs=0.1) for pause in failing.pauses[1:])
        await over(engine, running)

    play(story, tmp_path)


def test_a_claim_bears_silence_for_two_minutes(tmp_path: Path) -> None:
    """Then it ends in the journal, as unanswered; its job may be claimed anew."""

    async def story(world: World) -> None:
        engine, running = await idle(world)
        failing = Failing(world, "claim", DOWN)
        job_id = world.platform.add_job(CHALLENGE)
        record = await ended(world, job_id)
        assert (record.outcome, record.reason) == (JobOutcome.CANCELLED, "unanswered")
        assert 120 <= failing.tries[-1] - failing.tries[0] <= 140
        assert all(pause <= TABLE[Kind.CLAIM].pause.cap.total_seconds() for pause in failing.pauses)
        await over(engine, running)

    play(story, tmp_path)


@pytest.mark.parametrize(("error", "tries"), [(FORBIDDEN, 4), (TEAPOT, 1)], ids=["403", "418"])
def test_a_claim_s_refusal_is_borne_or_final(tmp_path: Path, error: PlatformRefused, tries: int) -> None:
    """A 403 three times; any other at once. A job that is listed all the same is no reason to hurry."""

    async def story(world: World) -> None:
        engine, running = await idle(world)
        failing = Failing(world, "claim", error)
        job_id = world.platform.add_job(CHALLENGE)
        record = await ended(world, job_id)
        assert (record.outcome, record.reason) == (JobOutcome.CANCELLED, error.code)
        assert len(failing.tries) == tries
        # Still listed, and still refused: left alone for a while each time.
        await asyncio.sleep(600)
        assert len(failing.tries) <= tries * (1 + 600 / NOT_GRANTED_FOR.total_seconds())
        await over(engine, running)

    play(story, tmp_path)


@pytest.mark.parametrize("error", [DOWN, BUSY, FORBIDDEN], ids=["503", "Retry-After", "403"])
def test_a_renewal_bears_an_hour(tmp_path: Path, error: PlatformError) -> None:
    """Also of 403; asked from every second to every ten, not sooner than was wished; then the CVM goes."""

    async def story(world: World) -> None:
        world.platform.term = timedelta(minutes=2)
        engine, running, job_id = await begun(world, "running")
        engine.parts.jobs.stop_claiming()
        failing = Failing(world, "renew", error)
        began = asyncio.get_running_loop().time()
        record = await ended(world, job_id)
        assert (record.outcome, record.reason) == (JobOutcome.LEASE_LOST, "outage")
        assert 3600 - 60 <= asyncio.get_running_loop().time() - began <= 3600 + 60
        cap = TABLE[Kind.RENEWAL].pause.cap.total_seconds()
        least = cap if error is BUSY else 1.0
        assert all(least <= pause <= cap + 0.1 for pause in failing.pauses)
        await until(lambda: not world.vmm.machines())
        assert not await world.store.outbox()
        await over(engine, running)

    play(story, tmp_path)


def test_a_refused_renewal_ends_the_work_at_once(tmp_path: Path) -> None:
    """Nothing is submitted, nothing released."""

    async def story(world: World) -> None:
        world.platform.term = timedelta(minutes=2)
        engine, running, job_id = await begun(world, "running")
        failing = Failing(world, "renew", LeaseRefused("409", code="lease_lost", status=409))
        record = await ended(world, job_id)
        assert (record.outcome, record.reason) == (JobOutcome.LEASE_LOST, "lease_lost")
        assert len(failing.tries) == 1
        assert world.platform.jobs[job_id].releases == []
        await over(engine, running)

    play(story, tmp_path)


@pytest.mark.parametrize(
    ("error", "most"), [(DOWN, 1000), (FORBIDDEN, 4), (TEAPOT, 1)], ids=["503", "403", "418"]
)
def test_a_release_is_tried_for_a_term(tmp_path: Path, error: PlatformError, most: int) -> None:
    """After that the lease lapses by itself."""

    async def story(world: World) -> None:
        world.platform.term = timedelta(minutes=2)
        engine, running, job_id = await begun(world, "running")
        failing = Failing(world, "release", error)
        assert engine.cancel_job(job_id)
        await until(lambda: not engine.parts.jobs.views())
        assert 1 <= len(failing.tries) <= most
        if error is DOWN:
            assert 120 <= failing.tries[-1] - failing.tries[0] <= 140
        assert all(pause <= TABLE[Kind.RELEASE].pause.cap.total_seconds() for pause in failing.pauses)
        await over(engine, running)

    play(story, tmp_path)


def test_a_submission_is_fetched_for_as_long_as_the_lease_lives(tmp_path: Path) -> None:
    """Silence is waited out while the lease is renewed; a refusal gives the job back."""

    async def story(world: World) -> None:
        world.platform.term = timedelta(minutes=2)
        engine, running = await idle(world)
        failing = Failing(world, "fetch_submission", DOWN)
        world.guests.may_finish.set()
        job_id = world.platform.add_job(CHALLENGE, submission=b"code", timeout_s=3600)
        await asyncio.sleep(900)
        cap = TABLE[Kind.SUBMISSION].pause.cap.total_seconds()
        assert len(failing.tries) > 900 / cap
        assert all(pause <= cap for pause in failing.pauses)
        failing.error = None
        await until(lambda: world.platform.jobs[job_id].finished)
        assert world.platform.jobs[job_id].attempt == 1
        failing.error = TEAPOT
        other = world.platform.add_job(CHALLENGE, submission=b"code")
        await until(lambda: bool(world.platform.jobs[other].releases))
        await over(engine, running)

    play(story, tmp_path)


def test_a_result_is_sent_until_it_is_answered(tmp_path: Path) -> None:
    """Through hours of silence and of 403; its refusal ends it under the refusal's code."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, "running")
        failing = Failing(world, "submit_result", DOWN)
        world.guests.may_finish.set()
        await asyncio.sleep(3600)
        failing.error = FORBIDDEN
        await asyncio.sleep(3600)
        cap = TABLE[Kind.RESULT].pause.cap.total_seconds()
        assert len(failing.tries) > 2 * 3600 / cap
        assert all(pause <= cap + 0.1 for pause in failing.pauses)
        assert [entry.job_id for entry in await world.store.outbox()] == [job_id]
        failing.error = ResultRefused("422", code="invalid_result", status=422)
        await asyncio.sleep(60)
        assert not await world.store.outbox()
        tried = len(failing.tries)
        await asyncio.sleep(600)
        assert len(failing.tries) == tried
        await over(engine, running)

    play(story, tmp_path)


def test_pushes_are_asked_for_again_for_ever_but_not_against_another_instance(tmp_path: Path) -> None:
    """A 401 does not end it; 4409 does, and the daemon with it."""

    async def story(world: World) -> None:
        failing = Failing(world, "notifications", FORBIDDEN)
        engine, running = await idle(world)
        await asyncio.sleep(3600)
        cap = TABLE[Kind.PUSH].pause.cap.total_seconds()
        assert len(failing.tries) > 3600 / cap
        assert all(pause <= cap for pause in failing.pauses)
        failing.error = HotkeyInUse("4409")
        await running
        assert engine.hotkey_taken
        assert not engine.parts.jobs.claiming

    play(story, tmp_path)


def test_log_lines_are_sent_once(tmp_path: Path) -> None:
    """What cannot be sent is dropped, whatever the reason; the job does not notice."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, "running")
        failing = Failing(world, "send_logs")
        for error in (DOWN, FORBIDDEN, TEAPOT):
            failing.error, failing.tries = error, []
            # As the session does it for each line of the guest's.
            engine.parts.jobs._slots[job_id].claimed.logged("info", "a line")  # type: ignore[union-attr] # it runs
            await asyncio.sleep(60)
            assert len(failing.tries) == 1
        world.guests.may_finish.set()
        await until(lambda: world.platform.jobs[job_id].finished)
        await over(engine, running)

    play(story, tmp_path)
