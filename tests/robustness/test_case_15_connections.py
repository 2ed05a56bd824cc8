"""What closes, floods and silences a real WebSocket, and what the loop over it makes of that."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web
from heard import Heard
from job_house import CHALLENGE, TOML, House, new_commit, tick
from platform_server import Scripted, client_of, scripted
from waiting import until
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from platform_validator.clock import SystemClock
from platform_validator.platform_client import notifications
from platform_validator.platform_client.notifications import NotificationLoop
from platform_validator.platform_client.port import PlatformUnavailable
from platform_validator.store.records import InstanceState

HELLO = json.dumps({"type": "hello", "stream": "s", "seq": 0, "server_time": "2026-01-01T00:00:00Z"})


class Hurried(SystemClock):
    """Sleeps in no time, and remembers for how long it was asked to."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
async def server() -> AsyncIterator[Scripted]:
    async with scripted() as made:
        yield made


@pytest.mark.parametrize(
    ("code", "said"),
    [
        pytest.param(1000, None, id="1000"),
        pytest.param(1008, "closed with 1008", marks=pytest.mark.robustness(15, "close-1008"), id="1008"),
        pytest.param(1012, "closed with 1012", marks=pytest.mark.robustness(15, "close-1012"), id="1012"),
        pytest.param(1013, "closed with 1013", marks=pytest.mark.robustness(15, "close-1013"), id="1013"),
        pytest.param(4401, "revoked (4401)", marks=pytest.mark.robustness(15, "close-4401"), id="4401"),
    ],
)
async def test_a_closed_connection_is_opened_again_ever_less_often(
    server: Scripted, code: int, said: str | None
) -> None:
    """Also a revoked one: a registration may come back. What closed it is shown meanwhile."""
    server.sends([HELLO], code)
    heard, clock = Heard(), Hurried()
    async with client_of(server.url) as client, asyncio.TaskGroup() as group:
        loop = NotificationLoop(client=client, listener=heard, clock=clock, rng=random.Random(3))
        running = group.create_task(loop.run())
        await until(lambda: len(clock.slept) >= 10)
        running.cancel()
    assert heard.told == ["poll"], "the same stream again is no news"
    bounds = [min(2.0**number, 60.0) for number in range(10)]
    assert all(0 <= slept <= bound for slept, bound in zip(clock.slept, bounds, strict=False))
    view = loop.view()
    assert not view.connected
    assert (said is None) == (view.last_error is None)
    assert said is None or said in str(view.last_error)


@pytest.mark.robustness(15, "close-4409")
async def test_a_hotkey_that_is_used_elsewhere_is_not_fought_for(server: Scripted) -> None:
    """Closed with 4409: no second connection, which would only throw the other one out."""
    server.sends([HELLO], 4409)
    heard = Heard()
    async with client_of(server.url) as client, asyncio.timeout(10):
        loop = NotificationLoop(client=client, listener=heard, clock=Hurried(), rng=random.Random(3))
        await loop.run()
    assert heard.told == ["poll", "in_use"]
    assert len(server.requests) == 1


@pytest.mark.robustness(15, "silence")
async def test_a_server_that_never_greets_is_given_up(
    server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it answers every ping: what it would push does not come either."""
    monkeypatch.setattr(notifications, "GREETED_WITHIN", 0.2)

    async def mute(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        return socket

    server.answer = mute
    async with client_of(server.url) as client, asyncio.timeout(10):
        with pytest.raises(PlatformUnavailable, match="greeted"):
            await anext(client.notifications())


@contextmanager
def flooding(frames: list[str]) -> Iterator[tuple[str, threading.Event]]:
    """A server in a thread of its own, which greets, and sends all this when the event is set."""
    let_go = threading.Event()

    def talk(connection: ServerConnection) -> None:
        connection.send(HELLO)
        assert let_go.wait(30)
        with contextlib.suppress(ConnectionClosed):
            for frame in frames:
                connection.send(frame)
            connection.recv()

    with serve(talk, "127.0.0.1", 0) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}", let_go
        finally:
            server.shutdown()
            serving.join(10)


@pytest.mark.slow(reason="ten thousand frames through a socket")
@pytest.mark.robustness(15, "burst")
async def test_ten_thousand_hints_through_a_socket_are_a_few_passes(tmp_path: Path) -> None:
    """They arrive over a while: the first makes a pass, and what comes after it waits for the next."""
    house = House(tmp_path, poll_every=60.0, clock=SystemClock())
    house.publish(new_commit(tmp_path, TOML))
    hints = [
        json.dumps({"type": "new_job", "seq": seq, "job_id": f"{seq}", "challenge_id": CHALLENGE})
        for seq in range(1, 10_001)
    ]
    with flooding(hints) as (url, let_go):
        async with house.open(), client_of(url) as client, asyncio.TaskGroup() as group:
            await house.state(InstanceState.ACTIVE)
            pushes = NotificationLoop(
                client=client,
                listener=house.notices,
                clock=SystemClock(),
                rng=random.Random(3),
            )
            house.platform.calls.clear()
            running = group.create_task(pushes.run())
            # The greeting asks for a pass of its own.
            while not (pushes.view().connected and house.platform.calls.count("pending_jobs")):
                await tick()
            house.platform.calls.clear()
            began = time.monotonic()
            let_go.set()
            while pushes.view().received < len(hints):
                await tick()
            # A pass that is due is waited for: passes that pushes ask for are half a second apart.
            while not house.platform.calls.count("pending_jobs"):
                await tick()
            passes, took = house.platform.calls.count("pending_jobs"), time.monotonic() - began
            assert 1 <= passes <= 2 + took / 0.5
            running.cancel()
