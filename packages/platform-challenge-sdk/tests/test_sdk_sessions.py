"""A challenge's handlers over a real session."""

from __future__ import annotations

import asyncio
import hashlib
import math
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from platform_challenge_sdk import Challenge, Context, SubmissionFailed
from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.serve import ChallengeServer
from platform_challenge_sdk.testing_validator import CHALLENGE, HOTKEY, TestingValidator
from platform_protocol.evidence import payload_sha256, result_record, result_report_data
from platform_protocol.ids import ChallengeId, JobId, VmName
from platform_protocol.session.messages import (
    Configure,
    GuestError,
    JobCancel,
    JobExecute,
    JobProgress,
    JobResult,
    Log,
    Ping,
    Pong,
    Ready,
    SubmissionChunk,
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
            import os  # noqa: PLC0415 - as a challenge would

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

        assert (await error_of(serve, challenge))[0] == "value_invalid"

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
        _, validator = await serve(challenge, per_job=False)
        await validator.start()
        for attempt in (1, 2):
            await validator.execute(attempt=attempt)
            assert (await validator.expect(JobResult)).result == {"score": attempt}

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


class TestConnections:
    async def test_a_result_that_was_not_acknowledged_is_sent_again_after_a_resume(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        finish = threading.Event()
        challenge.on_job(lambda ctx, payload: finish.wait(20) * 1)
        _, validator = await serve(challenge)
        await validator.start()
        job_id = await validator.execute()
        await validator.expect(JobProgress)
        await validator.drop()
        finish.set()
        hello = await validator.connect(resume=True)
        assert hello.known
        assert hello.state.configured
        assert hello.state.job_id == job_id
        done = await validator.expect(JobResult)
        assert done.result == {"score": 1}
        await validator.done(done.seq)
        await validator.send(Ping(n=1))
        await validator.expect(Pong)
        await validator.drop()
        hello = await validator.connect(resume=True)
        assert (hello.state.job, hello.received) == ("done", done.seq)
        await validator.send(Ping(n=2))
        assert (await validator.expect(Pong)).n == 2
        assert not [message for message in validator.seen if isinstance(message, JobResult)]

    async def test_a_values_request_without_an_answer_is_asked_again_with_its_id(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        @challenge.on_job()
        async def job(ctx: Context, payload: dict[str, Any]) -> int:
            return await ctx.values.set("k", 1)

        _, validator = await serve(challenge)
        await validator.start()
        await validator.execute()
        asked = await validator.expect(ValuesSet)
        await validator.done(asked.seq)
        await validator.drop()
        await validator.connect(resume=True)
        again = await validator.expect(ValuesSet)
        assert again.request_id == asked.request_id
        await validator.send(ValuesResult(request_id=again.request_id, version=9))
        assert (await validator.expect(JobResult)).result == {"score": 9}

    async def test_an_upload_goes_on_at_the_offset_that_hello_tells(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        challenge.on_job(lambda ctx, payload: (ctx.submission.path / "submission").stat().st_size)
        _, validator = await serve(challenge)
        await validator.start()
        data = bytes(range(256)) * 12_000
        digest = hashlib.sha256(data).hexdigest()
        order = JobExecute(
            job_id=JOB, attempt=1, challenge_id=CHALLENGE, payload={}, submission_sha256=digest
        )
        await validator.send(order)
        await validator.send(SubmissionChunk(job_id=JOB, offset=0, last=False, data=data[: 1 << 20]))
        await validator.send(Ping(n=1))
        await validator.expect(Pong)
        await validator.drop()
        hello = await validator.connect(resume=True)
        assert (hello.state.job, hello.state.submission_bytes) == ("receiving", 1 << 20)
        await validator.upload(order.job_id, data, hello.state.submission_bytes)
        assert (await validator.expect(JobResult)).result == {"score": len(data)}

    async def test_a_dialler_without_the_secret_is_closed_with_4403(
        self, serve: Serve, challenge: Challenge, port: int
    ) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge)
        await validator.start()
        stranger = TestingValidator(port, launch_secret=bytes(32), vm=VmName("pv-other"))
        with pytest.raises(ConnectionClosed) as closed:
            await stranger.connect()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4403
        await validator.send(Ping(n=1))
        assert (await validator.expect(Pong)).n == 1

    async def test_a_second_handshake_waits_for_no_place(self, serve: Serve, challenge: Challenge) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge)
        first = await validator.dial()
        second = await validator.dial()
        with pytest.raises(ConnectionClosed) as closed:
            await second.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1013
        await first.close()

    async def test_the_live_connection_stays_until_the_new_ones_hello(
        self, serve: Serve, challenge: Challenge, port: int
    ) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge)
        await validator.start()
        half = await validator.dial()
        await half.send("{}")
        with pytest.raises(ConnectionClosed):
            await half.recv()
        await validator.send(Ping(n=1))
        await validator.expect(Pong)
        old = validator.socket
        await validator.connect(resume=True)
        with pytest.raises(ConnectionClosed) as closed:
            await old.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4409

    async def test_no_session_before_the_challenge_is_ready(self, serve: Serve, challenge: Challenge) -> None:
        server, validator = await serve(challenge)
        server.health.status = "starting"
        with pytest.raises(InvalidStatus):
            await validator.dial()
