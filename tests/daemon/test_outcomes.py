"""How a job ends is one word everywhere: journal, metrics, logs, what operators see, and the Platform API."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.daemon.world import CHALLENGE, World, play, until

from platform_protocol.ids import ClaimId, JobId
from platform_protocol.platform_messages import ReleaseReason
from platform_protocol.session.messages import JobError
from platform_validator.cvm.vmm import VmmAtCapacity, VmmRefused
from platform_validator.daemon.engine import Engine
from platform_validator.platform_client.memory_job import MAX_ATTEMPTS, MAX_SANDBOX_DEATHS
from platform_validator.store.records import JobOutcome

MANY = 1000


@dataclass(frozen=True)
class Story:
    """What happens to a job, and what each side must say of it.

    Attributes:
        happens: To the job, in a world whose validator runs.
        outcome: In the journal, the metrics, the logs and the views.
        api: The job's status and outcome at the Platform API afterwards.
        released: With which reason it was given back, or None.
    """

    happens: Callable[[World, Engine, JobId], Awaitable[None]]
    outcome: JobOutcome
    api: tuple[str, str | None]
    released: ReleaseReason | None = None


async def finishes(world: World, _engine: Engine, _job: JobId) -> None:
    world.guests.may_finish.set()


async def fails(world: World, _engine: Engine, _job: JobId) -> None:
    world.guests.error = JobError(code="submission_failed", message="exit code 1")
    world.guests.may_finish.set()


async def hangs(_world: World, _engine: Engine, _job: JobId) -> None:
    """Nothing: its time runs out."""


async def is_cancelled(world: World, _engine: Engine, job: JobId) -> None:
    world.platform.cancel_job(job)


async def is_ended_by_its_operator(world: World, engine: Engine, job: JobId) -> None:
    assert engine.cancel_job(job)


async def is_taken_by_another(world: World, engine: Engine, job: JobId) -> None:
    world.platform.lapse(job)
    world.platform.claim(job, ClaimId("other"), "another validator")
    engine.parts.jobs.hint_cancelled(job)


async def its_cvm_dies(world: World, _engine: Engine, _job: JobId) -> None:
    world.guests.dies = True
    world.guests.may_finish.set()


async def no_cvm_is_made(world: World, _engine: Engine, _job: JobId) -> None:
    world.vmm.fail("create", VmmRefused("internal error"), times=MANY)


async def there_is_no_room(world: World, _engine: Engine, _job: JobId) -> None:
    world.vmm.fail("create", VmmAtCapacity("not enough CIDs"), times=MANY)


async def it_is_drained(world: World, engine: Engine, _job: JobId) -> None:
    engine.drain("signal")
    engine.drain("signal")


Out, Why = JobOutcome, ReleaseReason
STORIES = (
    Story(finishes, Out.SUCCEEDED, ("completed", "succeeded")),
    Story(fails, Out.FAILED, ("failed", "failed")),
    Story(hangs, Out.TIMEOUT, ("failed", "timeout")),
    Story(is_cancelled, Out.CANCELLED, ("cancelled", "cancelled")),
    Story(is_ended_by_its_operator, Out.CANCELLED, ("pending", None), Why.OPERATOR),
    Story(it_is_drained, Out.CANCELLED, ("pending", None), Why.DRAIN),
    Story(is_taken_by_another, Out.LEASE_LOST, ("claimed", None)),
    Story(its_cvm_dies, Out.SANDBOX_DIED, ("pending", None), Why.SANDBOX_DIED),
    Story(no_cvm_is_made, Out.INFRA_ERROR, ("pending", None), Why.INFRA),
    Story(there_is_no_room, Out.INFRA_ERROR, ("pending", None), Why.CAPACITY),
)


async def active(world: World) -> tuple[Engine, asyncio.Task[object]]:
    """A validator whose challenge serves."""
    engine = world.engine()
    running = asyncio.create_task(engine.run())
    await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
    return engine, running


def counted(engine: Engine) -> dict[str, int]:
    """`jobs_total` by outcome, as it is scraped, without zeros."""
    text = engine._metrics.text().decode()
    found = re.findall(r'^platform_validator_jobs_total\{outcome="(\w+)"\} (\d+)', text, re.MULTILINE)
    return {outcome: int(count) for outcome, count in found if int(count)}


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.happens.__name__)
def test_an_outcome_is_one_word_everywhere(tmp_path: Path, story: Story) -> None:
    """Walked from the cause to the Platform API; what was not submitted has no score there."""

    async def told(world: World) -> None:
        engine, running = await active(world)
        if story.happens in {no_cvm_is_made, there_is_no_room}:
            await story.happens(world, engine, JobId(""))
            job_id = world.platform.add_job(CHALLENGE)
        else:
            job_id = world.platform.add_job(CHALLENGE, timeout_s=60)
            await world.guests.running.wait()
            engine.parts.jobs.stop_claiming()
            await story.happens(world, engine, job_id)
        while not counted(engine):
            await asyncio.sleep(1)
        engine.parts.jobs.stop_claiming()
        await asyncio.sleep(5)
        first = [view for view in await engine.parts.jobs.recent(MANY) if view.attempt == 1]
        job = world.platform.jobs[job_id]
        assert [view.outcome for view in first] == [story.outcome]
        assert story.outcome.value in counted(engine)
        assert (job.status, job.outcome) == story.api
        assert job.releases[:1] == ([story.released] if story.released else [])
        assert (job.result is not None) == (story.outcome in {Out.SUCCEEDED, Out.FAILED, Out.TIMEOUT})
        if job.result is not None:
            assert job.result.outcome == story.outcome.value
            assert job.result.score == (0.5 if story.outcome is Out.SUCCEEDED else 0.0)
        world.vmm.heal()
        engine.drain("over")
        await running

    with capture_logs() as logs:
        play(told, tmp_path)
    ended = [line["outcome"] for line in logs if line["event"] == "job_ended"]
    assert ended[0] == story.outcome


@pytest.mark.parametrize(
    ("happens", "times", "outcome"),
    [(its_cvm_dies, MAX_SANDBOX_DEATHS, Out.SANDBOX_DIED), (no_cvm_is_made, MAX_ATTEMPTS, Out.INFRA_ERROR)],
)
def test_at_its_limit_a_job_ends_under_that_word_and_without_a_score(
    tmp_path: Path,
    happens: Callable[[World, Engine, JobId], Awaitable[None]],
    times: int,
    outcome: JobOutcome,
) -> None:
    """Five deaths of its CVM, or ten other failures of ours; all attempts are journaled under that word."""

    async def told(world: World) -> None:
        engine, running = await active(world)
        await happens(world, engine, JobId(""))
        job_id = world.platform.add_job(CHALLENGE)
        async with asyncio.timeout(4 * 3600):
            await world.guests.may_boot.wait()
            while not world.platform.jobs[job_id].finished:
                await asyncio.sleep(1)
        await asyncio.sleep(5)
        job = world.platform.jobs[job_id]
        assert (job.status, job.outcome, job.result) == ("failed", outcome.value, None)
        assert len(job.releases) == times
        assert counted(engine) == {outcome.value: times}
        assert [view.outcome for view in await engine.parts.jobs.recent(50)] == [outcome] * times
        world.vmm.heal()
        engine.drain("over")
        await running

    play(told, tmp_path)


def test_a_vmm_without_room_is_not_asked_again_and_again(tmp_path: Path) -> None:
    """The job is given back each time, and counts to no limit: soon it is not claimed for a while."""

    async def told(world: World) -> None:
        engine, running = await active(world)
        await there_is_no_room(world, engine, JobId(""))
        job_id = world.platform.add_job(CHALLENGE)
        await asyncio.sleep(600)
        job = world.platform.jobs[job_id]
        assert 3 <= job.attempt <= 10
        assert set(job.releases) == {Why.CAPACITY}
        world.vmm.heal()
        world.guests.may_finish.set()
        await until(lambda: job.finished)
        assert job.outcome == "succeeded"
        engine.drain("over")
        await running

    play(told, tmp_path)


def test_a_result_that_is_stored_when_the_drain_hurries_is_counted(tmp_path: Path) -> None:
    """It is on its way to the Platform API: how the job ended is known, and told."""

    async def told(world: World) -> None:
        engine, running = await active(world)
        acknowledging = asyncio.Event()

        async def never(_result: object) -> None:
            acknowledging.set()
            await asyncio.Event().wait()

        world.guests.acknowledge = never
        world.guests.may_finish.set()
        job_id = world.platform.add_job(CHALLENGE)
        await acknowledging.wait()
        engine.drain("signal")
        engine.drain("signal")
        await running
        assert world.platform.jobs[job_id].outcome == "succeeded"
        assert counted(engine) == {"succeeded": 1}

    play(told, tmp_path)
