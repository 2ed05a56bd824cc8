"""A CVM's program ends in time, whatever becomes of its validator, its challenge and its own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from platform_challenge_sdk import serve as serve_module
from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.held_jobs import HeldJobs
from platform_challenge_sdk.lifetime import JOB_SILENCE, LastResort
from platform_challenge_sdk.serve import ChallengeServer
from platform_challenge_sdk.testing_validator import TestingValidator
from platform_protocol.session.messages import GuestError, JobResult, Ping, Pong
from platform_protocol.user_config import UserConfig

HOUR = 3600.0


@dataclass
class Life:
    """A served challenge on a clock of the test's, and why it ended."""

    server: ChallengeServer
    validator: TestingValidator
    now: float = 0.0
    why: str | None = None
    looks: int = 0

    def clock(self) -> float:
        """The time, and one more look at it."""
        self.looks += 1
        return self.now

    async def ended(self) -> str:
        """Why it ended, once it has."""
        while self.why is None:
            await asyncio.sleep(0.01)
        return self.why

    async def lives(self) -> bool:
        """Whether it is still there after it has looked at the clock a few times."""
        enough = self.looks + 5
        while self.why is None and self.looks < enough:
            await asyncio.sleep(0.01)
        return self.why is None


@pytest.fixture
async def live(
    port: int, user_config: UserConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Any]]:
    """Serves with lifetimes of the test's; looks at the clock every hundredth of a second."""
    monkeypatch.setattr(serve_module, "_TICK", 0.01)
    stop = asyncio.Event()
    async with asyncio.timeout(50), asyncio.TaskGroup() as tasks:
        made: list[Life] = []

        async def begin(*, idle: float = 24 * HOUR, hard: float = 168 * HOUR, per_job: bool = True) -> Life:
            challenge = Challenge()

            @challenge.on_job()
            async def handle(_context: object, payload: dict[str, Any]) -> float:
                if "wait" in payload:
                    await asyncio.Event().wait()
                return 0.5

            config = user_config.model_copy(
                update={"max_lifetime_s": int(idle), "hard_lifetime_s": int(hard)}
            )
            server = ChallengeServer(
                challenge,
                config,
                Health("ready"),
                agent=Agent(()),
                scratch=tmp_path,
                jobs=HeldJobs(per_job=per_job),
            )
            life = Life(server, TestingValidator(port, launch_secret=config.secret, vm=config.vm))
            server.clock = life.clock
            made.append(life)

            async def serve() -> None:
                life.why = await server.serve("127.0.0.1", port, stop)

            tasks.create_task(serve())
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    return life
                await asyncio.sleep(0)  # it begins to listen in some turn of this loop

        yield begin
        for life in made:
            await life.validator.close()
        stop.set()


class TestSilence:
    async def test_without_a_frame_it_ends_after_max_lifetime(self, live: Any) -> None:
        life = await live()
        life.now = 24 * HOUR - 1
        assert await life.lives()
        life.now = 24 * HOUR
        assert await life.ended() == "max_lifetime_s without an authenticated frame"

    async def test_authenticated_frames_renew_it(self, live: Any) -> None:
        life = await live()
        await life.validator.start()
        life.now = 23 * HOUR
        await life.validator.send(Ping(n=1))
        await life.validator.expect(Pong)
        life.now = 46 * HOUR
        assert await life.lives()
        life.now = 47 * HOUR
        assert "max_lifetime_s" in await life.ended()

    async def test_whoever_cannot_authenticate_renews_nothing(self, live: Any, port: int) -> None:
        life = await live()
        life.now = 23 * HOUR

        def ask_health() -> None:
            asked = HTTPConnection("127.0.0.1", port, timeout=10)
            asked.request("GET", "/sdk/health")
            assert json.loads(asked.getresponse().read())["status"] == "ready"
            asked.close()

        await asyncio.to_thread(ask_health)
        async with connect(f"ws://127.0.0.1:{port}/sdk/ws") as stranger:
            await stranger.send('{"type":"begin"}')
            with contextlib.suppress(Exception):
                await stranger.recv()
        life.now = 24 * HOUR
        assert "max_lifetime_s" in await life.ended()

    @pytest.mark.parametrize("payload", [{}, {"wait": True}], ids=["ended", "running"])
    async def test_with_a_job_it_ends_15_minutes_after_the_last_frame(
        self, live: Any, payload: dict[str, Any]
    ) -> None:
        life = await live()
        await life.validator.start()
        life.now = 2 * HOUR
        await life.validator.execute(payload=payload)
        if not payload:
            await life.validator.expect(JobResult)
        await life.validator.drop()
        life.now = 2 * HOUR + JOB_SILENCE - 1
        assert await life.lives()
        life.now = 2 * HOUR + JOB_SILENCE
        assert await life.ended() == "15 min without an authenticated frame of a job"

    async def test_a_shared_one_waits_on_when_its_job_has_ended(self, live: Any) -> None:
        life = await live(per_job=False)
        await life.validator.start()
        await life.validator.execute(payload={})
        await life.validator.expect(JobResult)
        await life.validator.drop()
        life.now = 23 * HOUR
        assert await life.lives()


class TestHard:
    async def test_nothing_renews_the_hard_lifetime(self, live: Any) -> None:
        life = await live(idle=HOUR, hard=2 * HOUR)
        await life.validator.start()
        for number, now in enumerate((0.9 * HOUR, 1.8 * HOUR, 2 * HOUR - 1)):
            life.now = now
            await life.validator.send(Ping(n=number))
            await life.validator.expect(Pong)
        assert await life.lives()
        life.now = 2 * HOUR
        assert await life.ended() == "hard_lifetime_s is over"


class TestOneJob:
    async def test_a_per_job_cvm_accepts_one_job_in_its_life(self, live: Any) -> None:
        life = await live()
        await life.validator.start()
        await life.validator.execute(payload={})
        await life.validator.expect(JobResult)
        second = await life.validator.execute(payload={})
        refused = await life.validator.expect(GuestError)
        assert (refused.code, refused.request_id) == ("busy", second)


def test_the_thread_outlives_what_the_event_loop_changes_under_it() -> None:
    """Reading the jobs while the loop begins one may fail; that is a sign of life, not the thread's end."""
    calls = 0
    looked = threading.Event()

    def left() -> tuple[float, str]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("OrderedDict mutated during iteration")
        looked.set()
        return 1.0, "never"

    thread = LastResort(left, overdue=0.01)
    try:
        assert looked.wait(30)
    finally:
        thread.stop()


BLOCKED = """
import asyncio, os, time
from pathlib import Path
from platform_challenge_sdk import serve
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.serve import ChallengeServer
from platform_protocol.user_config import UserConfig

serve.LastResort.__init__.__defaults__ = (0.2,)
config = UserConfig(vm="pv-0123456789-7d1f5a52-6c1c-4d6e-9a57-0d9f3c1b2a44", proxy_url=None,
    launch_secret=UserConfig.encode_secret(bytes(32)), validator_base_url="http://127.0.0.1:1",
    max_lifetime_s=1, hard_lifetime_s=1)

async def main():
    server = ChallengeServer(Challenge(), config, Health("ready"), scratch=Path("/tmp"))
    serving = asyncio.ensure_future(server.serve("127.0.0.1", 0))
    await asyncio.sleep(0)  # the server's turn, in which its last resort begins
    time.sleep(600)  # a handler that never gives the event loop back

asyncio.run(main())
"""


@pytest.mark.slow(reason="a lifetime is at least a second")
def test_a_handler_that_holds_the_event_loop_does_not_outlive_it() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, timeout=50, check=False)
    assert done.returncode == 70
    assert b"ended by force, for the event loop stands still: hard_lifetime_s is over" in done.stderr
