"""A challenge's handlers over a real session."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from platform_challenge_sdk import Challenge, Context, SubmissionFailed
from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.serve import ChallengeServer
from platform_challenge_sdk.testing_validator import CHALLENGE, HOTKEY, TestingValidator
from platform_protocol.evidence import payload_sha256, result_record, result_report_data
from platform_protocol.ids import JobId
from platform_protocol.session.messages import (
    Configure,
    GuestError,
    JobExecute,
    JobProgress,
    JobResult,
    Log,
    Ping,
    Pong,
    ValuesGet,
    ValuesResult,
    ValuesSet,
    WeightsRequest,
    WeightsResponse,
)

JOB = JobId("7d1f5a52-6c1c-4d6e-9a57-0d9f3c1b2a44")
Serve = Callable[..., Awaitable[tuple[ChallengeServer, TestingValidator]]]
Tar = Callable[[dict[str, str]], bytes]


@pytest.fixture
def challenge() -> Challenge:
    return Challenge()


async def error_of(serve: Serve, challenge: Challenge) -> tuple[str, str]:
    """(code, message) of the job that the challenge fails."""
    _, validator = await serve(challenge)
    await validator.start()
    await validator.execute()
    done = await validator.expect(JobResult)
    assert done.result is None
    assert done.error is not None
    return done.error.code, done.error.message


class TestHandlers:
    async def test_hooks_run_in_order_with_the_operators_environment_before_ready(
        self, serve: Serve, challenge: Challenge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called: list[str] = []
        monkeypatch.delenv("SDK_TEST_TOKEN", raising=False)

        @challenge.on_startup
        def startup() -> None:
            called.append(f"startup {os.environ['SDK_TEST_TOKEN']}")

        @challenge.on_ready
        async def ready() -> None:
            called.append("ready")

        @challenge.on_job("b")
        @challenge.on_job
        def job(ctx: Context, payload: dict[str, Any]) -> float:
            return 1.0

        _, validator = await serve(challenge)
        monkeypatch.setenv("SDK_TEST_TOKEN", "")
        message = await validator.start(env={"SDK_TEST_TOKEN": "t"})
        assert called == ["startup t", "ready"]
        assert message.handlers == ["b", "default"]

    async def test_a_failing_startup_is_told_and_shown(self, serve: Serve, challenge: Challenge) -> None:
        @challenge.on_startup
        def startup() -> None:
            sys.exit("no model")

        server, validator = await serve(challenge)
        await validator.connect()
        await validator.send(Configure(env={}, challenge_id=CHALLENGE))
        told = await validator.expect(GuestError)
        assert (told.code, server.health.status) == ("startup_failed", "failed")
        assert "SystemExit: no model" in told.message

    async def test_an_async_handler_gets_the_submission_and_runs_it_contained(
        self, serve: Serve, challenge: Challenge, tar: Tar
    ) -> None:
        @challenge.on_job()
        async def job(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
            ctx.progress(50, "half")
            outcome = await ctx.submission.run(["python3", "main.py"], stdin=payload["say"], timeout=20)
            ctx.log.info(outcome.text)
            return {"score": 0.5, "metrics": {"attempt": ctx.job.attempt}}

        _, validator = await serve(challenge)
        await validator.start()
        await validator.execute(tar({"main.py": "print(input()[::-1])"}), payload={"say": "abc"}, attempt=3)
        done = await validator.expect(JobResult)
        assert done.error is None
        assert done.result == {"score": 0.5, "metrics": {"attempt": 3}}
        progress = [message.percent for message in validator.seen if isinstance(message, JobProgress)]
        assert progress == [0, 50]
        assert [message.message for message in validator.seen if isinstance(message, Log)] == ["cba\n"]

    async def test_a_plain_handler_runs_in_a_thread_with_synchronous_twins(
        self, serve: Serve, challenge: Challenge, tar: Tar
    ) -> None:
        @challenge.on_job("named")
        def job(ctx: Context, payload: dict[str, Any]) -> int:
            assert threading.current_thread() is not threading.main_thread()
            ctx.values.sync.set("k", {"n": 1})
            return len(ctx.submission.run_sync(["python3", ctx.submission.filename or ""], timeout=20).stdout)

        _, validator = await serve(challenge)
        await validator.start()
        await validator.execute(b"print('four!')", name="named")
        written = await validator.expect(ValuesSet)
        assert (written.key, written.value) == ("k", {"n": 1})
        await validator.send(ValuesResult(request_id=written.request_id, version=1))
        done = await validator.expect(JobResult)
        assert done.result == {"score": 6}

    async def test_values_are_asked_of_the_validator(self, serve: Serve, challenge: Challenge) -> None:
        @challenge.on_job()
        async def job(ctx: Context, payload: dict[str, Any]) -> Any:
            return await ctx.values.get("best", 0.0)

        _, validator = await serve(challenge)
        await validator.start()
        await validator.execute()
        asked = await validator.expect(ValuesGet)
        await validator.send(ValuesResult(request_id=asked.request_id, value=0.25, version=4))
        assert (await validator.expect(JobResult)).result == {"score": 0.25}

    async def test_weights_are_answered_with_weights_or_the_reason(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        @challenge.on_weights
        def weights(results: list[dict[str, Any]]) -> dict[str, float]:
            return {
                result["hotkey"]: 1 / result["score"] if result["score"] else math.inf for result in results
            }

        _, validator = await serve(challenge)
        await validator.start()
        await validator.send(WeightsRequest(request_id="1", results=[{"hotkey": "a", "score": 0.5}]))
        assert (await validator.expect(WeightsResponse)).weights == {"a": 2.0}
        await validator.send(WeightsRequest(request_id="2", results=[{"hotkey": "a", "score": 0}]))
        refused = await validator.expect(WeightsResponse)
        assert refused.error is not None
        assert "finite" in refused.error.message


class TestFailures:
    @pytest.mark.parametrize(
        ("raised", "code", "message"),
        [
            (SubmissionFailed("wrote nonsense"), "submission_failed", "wrote nonsense"),
            (ValueError("no"), "handler_error", "ValueError: no"),
            (SystemExit(0), "handler_error", "SystemExit: 0"),
            (KeyboardInterrupt(), "handler_error", "KeyboardInterrupt"),
            (asyncio.CancelledError(), "handler_error", "CancelledError"),
            (StopIteration(), "handler_error", "StopIteration"),
            (OSError("a\udcffb"), "handler_error", "OSError: a?b"),
        ],
        ids=lambda case: type(case).__name__ if isinstance(case, BaseException) else "",
    )
    @pytest.mark.parametrize("plain", [True, False], ids=["plain", "async"])
    async def test_whatever_a_handler_raises_ends_its_job_alone(
        self,
        serve: Serve,
        challenge: Challenge,
        raised: BaseException,
        code: str,
        message: str,
        plain: bool,
    ) -> None:
        if plain:

            @challenge.on_job()
            def job(ctx: Context, payload: dict[str, Any]) -> None:
                raise raised
        else:

            @challenge.on_job()
            async def job_async(ctx: Context, payload: dict[str, Any]) -> None:
                raise raised

        _, validator = await serve(challenge)
        await validator.start()
        await validator.execute()
        done = await validator.expect(JobResult)
        assert done.error is not None
        assert done.error.code == code
        assert message in done.error.message
        await validator.send(Ping(n=7))
        assert (await validator.expect(Pong)).n == 7

    @pytest.mark.parametrize(
        ("returned", "code", "message"),
        [
            (None, "result_invalid", "NoneType"),
            ({"metrics": {}}, "result_invalid", "'score'"),
            ({"score": True}, "result_invalid", "True"),
            ({"score": float("nan")}, "result_invalid", "nan"),
            ({"score": 1, "metrics": {"big": 2**60}}, "result_invalid", "$.metrics.big"),
            ({"score": 1, "text": "\ud800"}, "result_invalid", "$.text"),
            ({"score": 1, "object": object()}, "result_invalid", "$.object"),
            ({"score": 1, "text": "x" * (1 << 20)}, "result_too_large", "1048576"),
        ],
    )
    async def test_a_result_that_is_none_is_refused_by_name(
        self, serve: Serve, challenge: Challenge, returned: Any, code: str, message: str
    ) -> None:
        challenge.on_job(lambda ctx, payload: returned)
        told = await error_of(serve, challenge)
        assert told[0] == code
        assert message in told[1]

    async def test_a_job_that_no_handler_takes_fails(self, serve: Serve, challenge: Challenge) -> None:
        challenge.on_job("other")(lambda ctx, payload: 1)
        assert "no handler for job None" in (await error_of(serve, challenge))[1]

    async def test_a_payload_that_is_not_i_json_fails_by_name(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge)
        await validator.start()
        await validator.execute(payload={"seed": 2**63})
        done = await validator.expect(JobResult)
        assert done.error is not None
        assert done.error.code == "payload_invalid"
        assert "$.seed" in done.error.message

    async def test_a_value_that_is_no_json_is_refused_before_it_is_sent(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        @challenge.on_job()
        async def job(ctx: Context, payload: dict[str, Any]) -> None:
            await ctx.values.set("k", float("inf"))

        assert (await error_of(serve, challenge))[0] == "not_json"

    async def test_another_submission_than_the_announced_one_is_unreadable(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge)
        await validator.start()
        order = JobExecute(
            job_id=JOB, attempt=1, challenge_id=CHALLENGE, payload={}, submission_sha256="0" * 64
        )
        await validator.send(order)
        await validator.upload(order.job_id, b"else")
        done = await validator.expect(JobResult)
        assert done.error is not None
        assert done.error.code == "submission_unreadable"


class TestEvidence:
    async def test_the_quote_binds_what_was_run_and_what_came_out(
        self, serve: Serve, challenge: Challenge, agent: tuple[Agent, list[bytes]]
    ) -> None:
        challenge.on_job(lambda ctx, payload: {"score": 1})
        maker, asked = agent
        _, validator = await serve(challenge, agent=maker)
        await validator.start()
        assert validator.offer is not None
        assert (validator.offer.quote, asked) == (b"\xaa\xbb", [validator.offer.report_data])
        job_id = await validator.execute(payload={"seed": 1}, attempt=2)
        done = await validator.expect(JobResult)
        record = result_record(
            job_id=job_id,
            attempt=2,
            validator=HOTKEY,
            challenge_id=CHALLENGE,
            submission_sha256=None,
            payload_sha256=payload_sha256({"seed": 1}),
            result={"score": 1},
        )
        assert asked[1] == result_report_data(record)
        assert done.evidence == {"quote": "qrs=", "event_log": "[]"}

    async def test_without_an_agent_the_quote_is_null(self, serve: Serve, challenge: Challenge) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge)
        await validator.start()
        assert validator.offer is not None
        assert validator.offer.quote is None
        await validator.execute()
        assert (await validator.expect(JobResult)).evidence == {"quote": None, "event_log": ""}
