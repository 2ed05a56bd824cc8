"""Jobs of a VM, one by one or several at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from platform_challenge_sdk import Challenge, Context
from platform_challenge_sdk.held_jobs import HeldJobs
from platform_challenge_sdk.serve import ChallengeServer
from platform_challenge_sdk.testing_validator import CHALLENGE, TestingValidator
from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.session.messages import (
    Configure,
    GuestError,
    JobCancel,
    JobExecute,
    JobProgress,
    JobResult,
    Ping,
    Pong,
    Ready,
)

JOB = JobId("7d1f5a52-6c1c-4d6e-9a57-0d9f3c1b2a44")
Serve = Callable[..., Awaitable[tuple[ChallengeServer, TestingValidator]]]
Tar = Callable[[dict[str, str]], bytes]


@pytest.fixture
def challenge() -> Challenge:
    return Challenge()


class TestOneJob:
    async def test_a_per_job_vm_takes_one_job_in_its_life(self, serve: Serve, challenge: Challenge) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge)
        await validator.start()
        await validator.execute()
        await validator.expect(JobResult)
        await validator.execute()
        assert (await validator.expect(GuestError)).code == "busy"

    async def test_a_shared_vm_takes_one_after_the_other(self, serve: Serve, challenge: Challenge) -> None:
        challenge.on_job(lambda ctx, payload: ctx.job.attempt)
        _, validator = await serve(challenge, jobs=HeldJobs(per_job=False))
        await validator.start()
        for attempt in (1, 2):
            await validator.execute(attempt=attempt)
            result = await validator.expect(JobResult)
            assert (result.result, result.attempt) == ({"score": attempt}, attempt)

    async def test_a_shared_vm_runs_so_many_at_once_and_refuses_the_next_by_its_id(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        go_on = asyncio.Event()

        @challenge.on_job()
        async def job(ctx: Context, payload: dict[str, Any]) -> int:
            await go_on.wait()
            return 1

        server, validator = await serve(challenge, jobs=HeldJobs(per_job=False, concurrency=2))
        await validator.start()
        first, second, third = [await validator.execute() for _ in range(3)]
        refused = await validator.expect(GuestError)
        assert (refused.code, refused.request_id) == ("busy", third)
        state = server.jobs.state(configured=True)
        assert state.jobs is not None
        assert [(each.job_id, each.job) for each in state.jobs] == [(first, "running"), (second, "running")]
        await validator.send(JobCancel(job_id=first, reason="not wanted"))
        cancelled = await validator.expect(JobResult)
        assert cancelled.error is not None
        assert (cancelled.job_id, cancelled.error.code) == (first, "cancelled")
        fourth = await validator.execute()
        go_on.set()
        ended = {(await validator.expect(JobResult)).job_id for _ in range(2)}
        assert ended == {second, fourth}

    async def test_a_later_attempt_waits_for_the_end_of_the_one_before(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        @challenge.on_job()
        async def job(ctx: Context, payload: dict[str, Any]) -> int:
            if ctx.job.attempt == 1:
                await asyncio.Event().wait()
            return ctx.job.attempt

        _, validator = await serve(challenge, jobs=HeldJobs(per_job=False, concurrency=2))
        await validator.start()
        order = JobExecute(job_id=JOB, attempt=1, challenge_id=CHALLENGE, payload={})
        again = order.model_copy(update={"attempt": 2})
        await validator.send(order)
        await validator.send(again)
        assert (await validator.expect(GuestError)).code == "busy"
        await validator.send(JobCancel(job_id=JOB, reason="lease_lost"))
        await validator.send(again)
        results = [await validator.expect(JobResult) for _ in range(2)]
        assert [(each.attempt, each.result) for each in results] == [(1, None), (2, {"score": 2})]

    async def test_the_same_order_twice_runs_once(self, serve: Serve, challenge: Challenge) -> None:
        runs: list[int] = []

        @challenge.on_job()
        def job(ctx: Context, payload: dict[str, Any]) -> int:
            runs.append(1)
            return 1

        _, validator = await serve(challenge)
        await validator.start()
        order = JobExecute(job_id=JOB, attempt=1, challenge_id=CHALLENGE, payload={})
        await validator.send(order)
        await validator.send(order)
        await validator.expect(JobResult)
        await validator.send(Ping(n=1))
        await validator.expect(Pong)
        assert runs == [1]

    async def test_a_job_before_configure_or_of_another_challenge_is_refused(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge)
        await validator.connect()
        await validator.execute()
        assert (await validator.expect(GuestError)).code == "not_ready"
        await validator.send(Configure(env={}, challenge_id=ChallengeId("another")))
        await validator.expect(Ready)
        await validator.execute()
        assert (await validator.expect(GuestError)).code == "wrong_challenge"

    async def test_a_cancelled_job_ends_once_and_kills_what_runs_of_the_submission(
        self, serve: Serve, challenge: Challenge, tar: Tar
    ) -> None:
        ended = asyncio.Event()

        @challenge.on_job()
        async def job(ctx: Context, payload: dict[str, Any]) -> int:
            try:
                await ctx.submission.run(["python3", "main.py"], timeout=40)
            finally:
                ended.set()
            return 1

        _, validator = await serve(challenge)
        await validator.start()
        job_id = await validator.execute(tar({"main.py": "import time; time.sleep(60)"}))
        await validator.expect(JobProgress)
        await validator.send(JobCancel(job_id=job_id, reason="lease lost"))
        done = await validator.expect(JobResult)
        assert done.error is not None
        assert (done.error.code, done.error.message) == ("cancelled", "lease lost")
        async with asyncio.timeout(10):
            await ended.wait()
