"""Connections to the SDK: what survives broken ones, and who holds none."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from waiting import until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from platform_challenge_sdk import Challenge, Context
from platform_challenge_sdk.serve import ChallengeServer
from platform_challenge_sdk.testing_validator import CHALLENGE, TestingValidator
from platform_protocol.ids import JobId, VmName
from platform_protocol.session.messages import (
    JobExecute,
    JobProgress,
    JobResult,
    Log,
    Ping,
    Pong,
    SubmissionChunk,
    ValuesResult,
    ValuesSet,
)
from platform_protocol.session.v2 import MAX_BEGIN

JOB = JobId("7d1f5a52-6c1c-4d6e-9a57-0d9f3c1b2a44")
Serve = Callable[..., Awaitable[tuple[ChallengeServer, TestingValidator]]]
Tar = Callable[[dict[str, str]], bytes]


@pytest.fixture
def challenge() -> Challenge:
    return Challenge()


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

    async def test_lines_that_are_lost_with_a_connection_are_counted_and_told(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        """By the next line, or at the latest before the result; the result itself is never among them."""
        began, away, said, finish = (threading.Event() for _ in range(4))

        @challenge.on_job()
        def job(ctx: Context, payload: dict[str, Any]) -> int:
            del payload
            began.set()
            away.wait(20)
            for line in "abcde":
                ctx.log.info(line)
            ctx.progress(50, "nor here")
            said.set()
            finish.wait(20)
            ctx.log.info("somebody is there again")
            return 1

        server, validator = await serve(challenge)
        await validator.start()
        job_id = await validator.execute()
        await validator.expect(JobProgress)
        assert await asyncio.to_thread(began.wait, 20)
        await validator.send(Ping(n=1))
        await validator.expect(Pong)
        await validator.drop()
        await until(lambda: server._live is None)
        away.set()
        assert await asyncio.to_thread(said.wait, 20)
        await validator.connect(resume=True)
        await until(lambda: server._live is not None)
        finish.set()
        told = await validator.expect(Log)
        assert (told.level, told.job_id) == ("warning", job_id)
        assert told.message == "log and progress lines lost: 6"
        assert (await validator.expect(Log)).message == "somebody is there again"
        assert (await validator.expect(JobResult)).result == {"score": 1}

    async def test_lines_lost_at_the_end_are_told_before_the_result(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        """No line comes after them: the gap shows all the same."""
        began, away, said, finish = (threading.Event() for _ in range(4))

        @challenge.on_job()
        def job(ctx: Context, payload: dict[str, Any]) -> int:
            del payload
            began.set()
            away.wait(20)
            ctx.log.info("the last line")
            said.set()
            return finish.wait(20) * 1

        server, validator = await serve(challenge)
        await validator.start()
        await validator.execute()
        await validator.expect(JobProgress)
        assert await asyncio.to_thread(began.wait, 20)
        await validator.send(Ping(n=1))
        await validator.expect(Pong)
        await validator.drop()
        await until(lambda: server._live is None)
        away.set()
        assert await asyncio.to_thread(said.wait, 20)
        await validator.connect(resume=True)
        await until(lambda: server._live is not None)
        finish.set()
        assert (await validator.expect(Log)).message == "log and progress lines lost: 1"
        await validator.expect(JobResult)

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

    async def test_a_handshake_that_is_not_finished_is_ended_and_frees_its_place(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge, handshake=0.2)
        silent = await validator.dial()
        with pytest.raises(ConnectionClosed) as closed:
            await silent.recv()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4400, "handshake timed out")

    async def test_a_dialler_who_draws_out_his_end_holds_no_place(
        self, serve: Serve, challenge: Challenge, port: int
    ) -> None:
        """He answers no close: that is waited for, and the next one has the place meanwhile."""
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"GET /sdk/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        writer.write(b"\x81\x82\x00\x00\x00\x00{}")
        assert (await reader.readexactly(4))[2:] == (4400).to_bytes(2, "big")
        await validator.start()
        writer.close()

    async def test_a_connection_without_even_a_request_is_ended(
        self, serve: Serve, challenge: Challenge, port: int
    ) -> None:
        """It takes no place, and is not kept for longer than a handshake."""
        challenge.on_job(lambda ctx, payload: 1)
        _, validator = await serve(challenge, handshake=0.2)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(20):
            await reader.read()
        writer.close()
        await validator.start()

    @pytest.mark.parametrize(("size", "code"), [(MAX_BEGIN, 4400), (MAX_BEGIN + 1, 1009), (2**21, 1009)])
    async def test_whoever_has_proved_nothing_is_read_for_64_kib(
        self, serve: Serve, challenge: Challenge, size: int, code: int
    ) -> None:
        """More is refused by its announced length; after the handshake frames may be large."""
        challenge.on_job(lambda ctx, payload: 1)
        server, validator = await serve(challenge)
        socket = await validator.dial()
        frame = '{"type":"' + "x" * (size - 11) + '"}'
        sending = asyncio.ensure_future(socket.send(frame))
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        await asyncio.wait({sending})
        assert sending.exception() is None or size > MAX_BEGIN
        await until(lambda: not server._handshaking)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == code
        await validator.start()
        await validator.socket.send(b"x" * 2**21)
        with pytest.raises(ConnectionClosed) as closed:
            await validator.socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4401
        assert "does not open" in closed.value.rcvd.reason

    async def test_a_connection_over_which_nothing_comes_is_ended_and_can_be_resumed(
        self, serve: Serve, challenge: Challenge
    ) -> None:
        challenge.on_job(lambda ctx, payload: 1)
        server, validator = await serve(challenge)
        await validator.start()
        server.idle = 0.2
        await validator.send(Ping(n=1))
        await validator.expect(Pong)
        with pytest.raises(ConnectionClosed) as closed:
            await validator.socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4408
        server.idle = 60
        assert (await validator.connect(resume=True)).known

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
