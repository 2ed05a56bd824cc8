"""The validator's session against the real Challenge SDK, over loopback."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.context import Context
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.serve import ChallengeServer
from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmName
from platform_protocol.session.messages import ValuesRequest, ValuesResult, ValuesSet
from platform_protocol.session.v2 import Offer
from platform_protocol.user_config import UserConfig
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.jobs import JobOrder
from platform_validator.cvm.session import CvmSession

CHALLENGE = ChallengeId("00000000-0000-4000-8000-000000000001")
VM = VmName("pv-0123456789-interop")
SECRET = b"s" * 32
SESSION = "11111111-1111-4111-8111-111111111111"


class Values:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: dict[str, Any] = {}

    async def answer(
        self, challenge_id: ChallengeId, session_id: str, request: ValuesRequest
    ) -> ValuesResult:
        if isinstance(request, ValuesSet):
            self.written[request.key] = request.value
        value = self.written.get(getattr(request, "key", ""))
        return ValuesResult(request_id=request.request_id, value=value, version=1 if value else None)


@dataclass
class Pair:
    """Both ends."""

    server: ChallengeServer
    session: CvmSession
    values: Values


async def accept(_offer: Offer) -> None:
    """Below Tee the launch secret authenticates."""


@pytest.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setenv("OPERATORS_VALUE", "before")
    challenge = Challenge()

    @challenge.on_job()
    async def handle(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
        await ctx.values.set("best", payload["x"])
        best = await ctx.values.get("best")
        ctx.progress(50, "half")
        return {"score": best, "value": os.environ["OPERATORS_VALUE"]}

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
    server = ChallengeServer(challenge, config, Health("ready"), scratch=tmp_path)
    values, stop = Values(), asyncio.Event()
    session = CvmSession(
        Callee(("127.0.0.1", port), VM, SECRET, SESSION, Hotkey("5DD")),
        challenge_id=CHALLENGE,
        env={"OPERATORS_VALUE": "configured"},
        judge=accept,
        values=values,
        pace=SessionPace(resume_for=2, retry=0.01, retry_most=0.05),
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve("127.0.0.1", port, stop))
        tasks.create_task(session.run())
        async with asyncio.timeout(10):
            await session.ready()
        with contextlib.ExitStack() as stack:
            stack.callback(stop.set)
            stack.callback(session.close)
            yield Pair(server, session, values)


async def run(pair: Pair, submission: Path | None, digest: str | None) -> tuple[Any, list[str]]:
    told: list[str] = []
    order = JobOrder(JobId("22222222-2222-4222-8222-222222222222"), 1, CHALLENGE, None, {"x": 0.5}, digest)
    async with asyncio.timeout(20):
        result = await pair.session.execute(
            order,
            submission,
            on_started=lambda _already: told.append("started"),
            on_progress=lambda percent, message: told.append(f"{percent:.0f} {message}"),
            on_log=lambda level, message: None,
        )
    return result, told


async def test_a_job_runs_in_the_real_sdk(pair: Pair) -> None:
    """Environment, values, progress and result cross the sealed session."""
    result, told = await run(pair, None, None)
    assert result.error is None
    assert result.result == {"score": 0.5, "value": "configured"}
    assert pair.values.written == {"best": 0.5}
    assert told[0] == "started"
    assert "50 half" in told


async def test_a_submission_of_many_chunks_survives_a_dropped_connection(pair: Pair, tmp_path: Path) -> None:
    """What was received is not sent again, and the archive arrives whole or the job fails by its digest."""
    path = tmp_path / "submission.bin"
    path.write_bytes(os.urandom(5 * 1024 * 1024 + 17))
    async with asyncio.TaskGroup() as tasks:
        job = tasks.create_task(run(pair, path, hashlib.sha256(path.read_bytes()).hexdigest()))
        while pair.server.jobs.state(configured=True).submission_bytes < 1024 * 1024:
            await asyncio.sleep(0)  # seen at the first turn of the loop, while the rest is on its way
        live = pair.server._live
        assert live is not None
        live.transport.abort()
    result, _ = job.result()
    assert result.error is None, result.error
    assert pair.session.reconnects == 1
