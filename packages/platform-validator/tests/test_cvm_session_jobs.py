"""The jobs that a session carries: orders, submissions, what is told of them, results, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from session_pair import (
    JOB,
    MakePair,
    gated,
    lost,
    session_pairs,
)

from platform_protocol.ids import JobId
from platform_protocol.session.messages import (
    GuestError,
    JobError,
    JobExecute,
    JobResult,
    Log,
)
from platform_validator.cvm.testing_guest import GuestScript, Outcome, ScriptedGuest


@pytest.fixture
async def make_pair() -> AsyncIterator[MakePair]:
    async with session_pairs() as make:
        yield make


async def test_a_job_is_told_of_from_its_start_to_its_result(make_pair: MakePair) -> None:
    """Started first, then progress and logs as they come, then the result with its number."""

    async def work(guest: ScriptedGuest, order: JobExecute, _submission: bytes) -> Outcome:
        await guest.say(Log(level="info", message="hello", job_id=order.job_id))
        return {"score": 0.5, "payload": order.payload}

    pair = await make_pair(GuestScript(work=work))
    await pair.ready()
    result = await pair.execute()
    assert result.result == {"score": 0.5, "payload": {"x": 1}}
    assert (result.error, result.attempt, result.job_id) == (None, 1, JOB)
    assert pair.told == ["started", "0 running", "info: hello"]


async def test_an_empty_error_is_a_failure(make_pair: MakePair) -> None:
    """Failure is the presence of `error`."""

    async def work(_guest: ScriptedGuest, _order: JobExecute, _submission: bytes) -> Outcome:
        return JobError()

    pair = await make_pair(GuestScript(work=work))
    result = await pair.execute()
    assert (result.result, result.error) == (None, JobError())


@pytest.mark.parametrize("size", [0, 1, 1024 * 1024, 3 * 1024 * 1024 + 5])
async def test_a_submission_arrives_whole(make_pair: MakePair, tmp_path: Path, size: int) -> None:
    """In chunks of 1 MiB, also an empty one."""
    path, data = tmp_path / "submission", os.urandom(size)
    path.write_bytes(data)
    got: list[bytes] = []

    async def work(_guest: ScriptedGuest, _order: JobExecute, submission: bytes) -> Outcome:
        got.append(submission)
        return {}

    pair = await make_pair(GuestScript(work=work))
    await pair.ready()
    await pair.execute(path)
    assert got == [data]


async def test_a_job_given_before_the_session_is_up_is_run_once_it_is(make_pair: MakePair) -> None:
    """And given once."""
    pair = await make_pair()
    result = await pair.execute()
    assert result.result is not None
    assert len(pair.guest.orders) == 1


async def test_a_refused_job_says_why(make_pair: MakePair) -> None:
    """The SDK's error message ends the job."""
    pair = await make_pair(gated(asyncio.Event()))
    await pair.ready()
    async with asyncio.TaskGroup() as group:
        job = group.create_task(lost(pair))
        await pair.guest.until(lambda guest: len(guest.orders) == 1)
        await pair.guest.say(GuestError(code="busy", message="this VM has its one job"))
    assert "one job" in str(job.result())


@pytest.mark.robustness(26, "before-the-start", "two-results", "another-token")
@pytest.mark.robustness(24, "another-job")
async def test_results_that_nobody_waits_for_do_not_hold_up_the_others(make_pair: MakePair) -> None:
    """Of another job, or a second one: dropped and acknowledged, and never taken for this job's."""

    async def work(guest: ScriptedGuest, order: JobExecute, _submission: bytes) -> Outcome:
        await guest.say(JobResult(job_id=JobId("another"), result={"score": 99.0}))
        return {"score": 0.5}

    pair = await make_pair(GuestScript(work=work))
    await pair.ready()
    result = await pair.execute()
    assert result.result == {"score": 0.5}
    await pair.session.acknowledge(result)
    await pair.guest.until(lambda guest: guest.pending == 0)
    await pair.guest.say(JobResult(job_id=JOB, result={"score": 99.0}))
    await pair.guest.until(lambda guest: guest.pending == 0)


async def test_a_cancelled_wait_leaves_the_session_usable(make_pair: MakePair) -> None:
    """A timed-out job is cancelled inside, and the next one runs."""
    gate = asyncio.Event()
    pair = await make_pair(gated(gate))
    await pair.ready()
    job = asyncio.ensure_future(pair.execute())
    await pair.guest.until(lambda guest: len(guest.orders) == 1)
    job.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await job
    await pair.session.cancel(JOB, "timeout")
    await pair.guest.until(lambda guest: [c.reason for c in guest.cancelled] == ["timeout"])
    gate.set()
    assert (await pair.execute(job=JobId("next"))).result == {"score": 1.0}
