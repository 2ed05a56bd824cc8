"""The validator's session against the SDK's server over real WebSockets, of whichever version is there."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import socket
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.context import Context
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.serve import ChallengeServer
from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmName
from platform_protocol.session.messages import ValuesGet, ValuesResult, ValuesSet
from platform_protocol.session.v2 import Offer, ValidatorHandshake
from platform_protocol.user_config import UserConfig
from platform_validator.cvm.connection import Callee
from platform_validator.cvm.session import CvmSession, GuestResult, JobOrder

SECRET = b"L" * 32
VM = VmName("pv-0123456789-1")


class Values:
    """A challenge's values, in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    async def answer(self, challenge_id: ChallengeId, session_id: str, request: Any) -> ValuesResult:
        del challenge_id, session_id
        if isinstance(request, ValuesSet):
            self.kept[request.key] = request.value
            return ValuesResult(request_id=request.request_id, version=1)
        assert isinstance(request, ValuesGet)
        found = request.key in self.kept
        return ValuesResult(
            request_id=request.request_id, value=self.kept.get(request.key), version=1 if found else None
        )


@dataclass
class Pair:
    """A served challenge and the validator's session with it."""

    session: CvmSession
    port: int
    values: Values
    release: asyncio.Event

    async def run(self, submission: Path | None, name: str | None = None) -> tuple[GuestResult, list[str]]:
        """One job; its result and log lines."""
        lines: list[str] = []
        digest = hashlib.sha256(submission.read_bytes()).hexdigest() if submission else None
        order = JobOrder(JobId("job"), 1, ChallengeId("c"), name, {"n": 1}, digest)
        result = await self.session.execute(
            order,
            submission,
            on_started=lambda _already: lines.append("started"),
            on_progress=lambda percent, message: None,
            on_log=lambda level, message: lines.append(message),
        )
        return result, lines


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    challenge = Challenge()
    release = asyncio.Event()

    @challenge.on_job()
    async def evaluate(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
        await ctx.values.set("seen", payload)
        ctx.log.info("reading")
        size = sum(path.stat().st_size for path in ctx.submission.path.iterdir()) if ctx.has_submission else 0
        return {"score": 0.5, "metrics": {"size": size}, "seen": await ctx.values.get("seen")}

    @challenge.on_job("slow")
    async def slow(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
        del ctx, payload
        await release.wait()
        return {"score": 1}

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = UserConfig(
        vm=VM,
        launch_secret=UserConfig.encode_secret(SECRET),
        validator_base_url="http://127.0.0.1:1",
        proxy_url=None,
        max_lifetime_s=600,
        hard_lifetime_s=600,
    )
    server = ChallengeServer(challenge, config, Health("ready"), agent=Agent(()), scratch=tmp_path)
    values = Values()

    async def accept(offer: Offer) -> None:
        assert offer.vm == VM

    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve("127.0.0.1", port, stop))
        session = CvmSession(
            Callee(
                address=("127.0.0.1", port),
                vm=VM,
                launch_secret=SECRET,
                session_id="00000000-0000-4000-8000-000000000001",
                validator=Hotkey("5abc"),
            ),
            challenge_id=ChallengeId("c"),
            env={"GIVEN": "yes"},
            judge=accept,
            values=values,
        )
        tasks.create_task(session.run())
        async with asyncio.timeout(20):
            await session.ready()
        yield Pair(session, port, values, release)
        session.close()
        stop.set()


@pytest.fixture
def submission(tmp_path: Path) -> Path:
    """A tar of more than three chunks."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("data")
        info.size = 3_500_000
        tar.addfile(info, io.BytesIO(os.urandom(info.size)))
    path = tmp_path / "submission.tar"
    path.write_bytes(out.getvalue())
    return path


async def test_a_job_with_a_large_submission_values_and_logs(pair: Pair, submission: Path) -> None:
    result, lines = await pair.run(submission)
    assert result.error is None
    assert result.result == {"score": 0.5, "metrics": {"size": 3_500_000}, "seen": {"n": 1}}
    assert pair.values.kept == {"seen": {"n": 1}}
    assert lines[0] == "started"
    assert "reading" in lines
    assert os.environ.pop("GIVEN") == "yes"
    await pair.session.acknowledge(result)


async def test_a_broken_connection_is_resumed_and_the_result_comes_once(pair: Pair) -> None:
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(pair.run(None, "slow"))
        async with asyncio.timeout(10):
            while pair.session.reconnects == 0:
                await asyncio.sleep(0.05)
                _break(pair.session)
        pair.release.set()
    result, _ = running.result()
    assert result.result == {"score": 1}
    await pair.session.acknowledge(result)


def _break(session: CvmSession) -> None:
    """Cut the live connection, as a network would."""
    session._link.cut()


async def test_a_dialler_without_the_secret_gets_4403_and_disturbs_nothing(pair: Pair) -> None:
    handshake = ValidatorHandshake(
        launch_secret=b"x" * 32, vm=VM, validator=Hotkey("5evil"), session_id="s", resume=False
    )
    async with connect(f"ws://127.0.0.1:{pair.port}/sdk/ws", proxy=None) as attacker:
        await attacker.send(handshake.begin())
        with pytest.raises(ConnectionClosed) as closed:
            await attacker.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4403
    result, _ = await pair.run(None)
    assert result.result is not None
    assert pair.session.reconnects == 0
