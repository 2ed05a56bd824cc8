"""Robustness 15: pushes that are wrong in every way change when something is looked at, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from tests.daemon.world import CHALLENGE, World, begun, play, until
from websockets.asyncio.server import ServerConnection, serve

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.notifications import ChallengeUpdated, JobCancelled, NewJob
from platform_protocol.signing import Keypair
from platform_validator.clock import SystemClock
from platform_validator.platform_client import notifications
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.notifications import NotificationLoop
from platform_validator.platform_client.port import Notification, PlatformUnavailable
from platform_validator.platform_client.signer import RequestSigner

HELLO = '{"type":"hello","stream":"s","seq":0,"server_time":"2026-01-01T00:00:00Z"}'


def new_job(seq: int, job_id: str = "j") -> NewJob:
    """A hint."""
    return NewJob(seq=seq, job_id=JobId(job_id), challenge_id=CHALLENGE)


@pytest.mark.robustness(15, "burst")
def test_ten_thousand_hints_are_one_pass(tmp_path: Path) -> None:
    """Robustness 15: a burst folds: the list is asked for once, and at most once more for what came after."""

    async def story(world: World) -> None:
        engine = world.engine()
        running = asyncio.create_task(engine.run())
        await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
        await until(lambda: engine.notifications.view().connected)
        world.platform.calls.clear()
        for number in range(10_000):
            world.platform.push_hint(new_job(number))
        await asyncio.sleep(2)
        assert engine.notifications.view().received >= 10_000
        assert 1 <= world.platform.calls.count("pending_jobs") <= 2
        assert "claim" not in world.platform.calls
        engine.drain("the story is over")
        await running

    play(story, tmp_path)


@pytest.mark.robustness(15, "lies")
def test_hints_that_lie_change_nothing(tmp_path: Path) -> None:
    """Robustness 15: duplicates, reordering, yesterday's, unknown ids: one attempt, one result."""

    async def story(world: World) -> None:
        engine, running, job_id = await begun(world, "running")
        lies: list[Notification] = [
            new_job(99, job_id),
            new_job(3, job_id),
            new_job(3, job_id),
            new_job(1, "no such job"),
            JobCancelled(seq=4, job_id=job_id),
            JobCancelled(seq=2, job_id=JobId("no such job")),
            ChallengeUpdated(seq=5, challenge_id=ChallengeId("none"), github_commit="0" * 40),
            ChallengeUpdated(seq=0, challenge_id=CHALLENGE, github_commit="f" * 40),
        ]
        for lie in lies:
            world.platform.push_hint(lie)
        await asyncio.sleep(10)
        assert [view.job_id for view in engine.parts.jobs.views()] == [job_id]
        assert engine.notifications.view().gaps >= 1
        world.guests.may_finish.set()
        await until(lambda: world.platform.jobs[job_id].finished)
        job = world.platform.jobs[job_id]
        assert (job.status, job.attempt) == ("completed", 1)
        engine.drain("the story is over")
        await running

    play(story, tmp_path)


@pytest.mark.robustness(15, "none")
def test_without_any_push_everything_goes_on(tmp_path: Path) -> None:
    """Robustness 15: hints that never come: the poll finds the job, a renewal its cancellation."""

    async def story(world: World) -> None:
        engine = world.engine()
        world.platform.term = timedelta(minutes=2)
        running = asyncio.create_task(engine.run())
        await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
        deaf = world.platform._listeners
        deaf.clear()
        job_id = world.platform.add_job(CHALLENGE, timeout_s=7200)
        await world.guests.running.wait()
        world.platform.cancel_job(job_id, push=False)
        began = asyncio.get_running_loop().time()
        await until(lambda: not engine.parts.jobs.views())
        assert asyncio.get_running_loop().time() - began <= 60
        engine.drain("the story is over")
        await running

    play(story, tmp_path)


class Heard:
    """A listener that counts."""

    def __init__(self) -> None:
        self.polls = 0
        self.jobs: list[JobId] = []

    def poll_now(self) -> None:
        self.polls += 1

    def new_job(self, hint: NewJob) -> None:
        self.jobs.append(hint.job_id)

    def challenge_updated(self, hint: ChallengeUpdated) -> None:
        raise AssertionError

    def job_cancelled(self, hint: JobCancelled) -> None:
        raise AssertionError

    def hotkey_in_use(self) -> None:
        raise AssertionError


@asynccontextmanager
async def served(
    talk: Callable[[ServerConnection], Awaitable[None]],
) -> AsyncIterator[HttpPlatformClient]:
    """A WebSocket server that talks so, and a client of it."""
    async with serve(talk, "127.0.0.1", 0, close_timeout=0.1) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        keys = RequestSigner(
            keypair=Keypair.from_seed(bytes(32)), base_url=url, instance="i", clock=SystemClock()
        )
        async with HttpPlatformClient(base_url=url, signer=keys, clock=SystemClock()) as client:
            yield client


@pytest.mark.robustness(15, "utf-8")
async def test_invalid_utf8_ends_the_connection_and_nothing_else() -> None:
    """Robustness 15: RFC 6455 8.1: closed with 1007, and opened again later."""

    async def talk(socket: ServerConnection) -> None:
        await socket.send(HELLO)
        await socket.send(b"\xff\xfe\xfa", text=True)
        await socket.wait_closed()

    async with served(talk) as client:
        stream = client.notifications()
        await anext(stream)
        with pytest.raises(PlatformUnavailable):
            await anext(stream)


@pytest.mark.robustness(15, "silence")
async def test_silence_after_the_handshake_is_found_by_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Robustness 15: a server that never says anything again, not even a pong, is given up."""
    monkeypatch.setattr(notifications, "PING_EVERY", 0.1)
    over = asyncio.Event()

    async def talk(socket: ServerConnection) -> None:
        await socket.send(HELLO)
        socket.transport.pause_reading()
        await over.wait()
        socket.transport.abort()

    async with served(talk) as client:
        stream = client.notifications()
        await anext(stream)
        async with asyncio.timeout(10):
            with pytest.raises(PlatformUnavailable):
                await anext(stream)
        over.set()


class Flapping:
    """A client whose connections break at once, or after a second."""

    def __init__(self, lasts: float) -> None:
        self.lasts = lasts
        self.opened: list[float] = []

    async def notifications(self) -> AsyncIterator[object]:
        self.opened.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.lasts)
        raise PlatformUnavailable("closed with 1012")
        yield


class LoopClock(SystemClock):
    """The loop's time."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def flap(client: Flapping, seed: int, seconds: float) -> None:
    """Let a loop reconnect for so long."""
    loop = NotificationLoop(
        client=client,  # type: ignore[arg-type] # notifications is all that the loop asks of it
        listener=Heard(),
        clock=LoopClock(),
        rng=random.Random(seed),
    )
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await loop.run()


@pytest.mark.robustness(15, "flapping")
def test_flapping_for_ten_minutes_is_met_with_patience(tmp_path: Path) -> None:
    """Robustness 15: connections that break every second: no storm of them, and no giving up either."""
    client = Flapping(lasts=1.0)

    async def story(_: World) -> None:
        await flap(client, 1, 600)

    play(story, tmp_path)
    assert 10 <= len(client.opened) <= 60
    assert (
        max(later - earlier for earlier, later in zip(client.opened, client.opened[1:], strict=False)) <= 62
    )


@pytest.mark.robustness(15, "restart")
def test_a_thousand_clients_of_a_restarted_server_come_back_spread(tmp_path: Path) -> None:
    """Robustness 15: down for ten seconds, every connection broken at once: no second sees them all."""
    clients = [Flapping(lasts=0.0) for _ in range(1000)]

    async def story(_: World) -> None:
        async with asyncio.TaskGroup() as group:
            for seed, client in enumerate(clients):
                group.create_task(flap(client, seed, 120))

    play(story, tmp_path)
    back = [next(at for at in client.opened if at >= 10) for client in clients]
    in_a_second = [sum(second <= at < second + 1 for at in back) for second in range(10, 120)]
    assert max(in_a_second) < 250
    assert statistics.median(back) < 30
