"""Notifications over a WebSocket that misbehaves, and what the loop over them tells."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator

import pytest
from aiohttp import WSCloseCode, web
from heard import Heard
from platform_server import KEY, Scripted, client_of, closing, scripted

from platform_protocol.ids import ChallengeId, JobId
from platform_validator.clock import SystemClock
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.notifications import NotificationLoop
from platform_validator.platform_client.port import (
    HotkeyInUse,
    NotAuthorized,
    PlatformError,
    PlatformUnavailable,
)

CHALLENGE = ChallengeId("00000000-0000-4000-8000-000000000001")
JOB = JobId("00000000-0000-4000-8000-000000000002")
HELLO = json.dumps({"type": "hello", "stream": "s", "seq": 3, "server_time": "2026-01-01T00:00:00Z"})


@pytest.fixture
async def server() -> AsyncIterator[Scripted]:
    async with scripted() as made:
        yield made


@pytest.fixture
async def client(server: Scripted) -> AsyncIterator[HttpPlatformClient]:
    async with client_of(server.url) as made:
        yield made


async def test_unreadable_frames_are_passed_over(server: Scripted, client: HttpPlatformClient) -> None:
    """Unreadable frames are passed over."""
    frames: list[str | bytes] = [HELLO, "nonsense", b"\x00", '{"type":"new_job"}', '{"type":"dance"}']
    new_job = json.dumps({"type": "new_job", "seq": 4, "job_id": JOB, "challenge_id": CHALLENGE})
    server.sends([*frames, new_job], WSCloseCode.OK)
    received = [notification async for notification in client.notifications()]
    assert [each.type for each in received] == ["hello", "dance", "new_job"]
    assert server.requests[0].path == f"/validators/{KEY.address}/ws"
    assert server.requests[0].headers["X-Validator-Hotkey"] == KEY.address


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1008, PlatformUnavailable), (1013, PlatformUnavailable), (4401, NotAuthorized), (4409, HotkeyInUse)],
)
async def test_close_codes(
    server: Scripted, client: HttpPlatformClient, code: int, kind: type[PlatformError]
) -> None:
    """Close codes."""
    server.sends([HELLO], code)
    stream = client.notifications()
    await anext(stream)
    with pytest.raises(kind):
        await anext(stream)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, NotAuthorized), (403, NotAuthorized), (503, PlatformUnavailable), (302, PlatformUnavailable)],
)
async def test_refused_upgrades(
    server: Scripted, client: HttpPlatformClient, status: int, kind: type[PlatformError]
) -> None:
    """Refused upgrades."""
    server.says(status, {"code": "hotkey_mismatch"}, {"Location": "http://127.0.0.1:1/"})
    with pytest.raises(kind):
        await anext(client.notifications())
    assert len(server.requests) == 1


@pytest.mark.robustness(15, "5-mb-frame")
async def test_a_frame_of_five_megabytes_ends_the_connection_and_nothing_else(
    server: Scripted, client: HttpPlatformClient
) -> None:
    """A frame of five megabytes ends the connection and nothing else."""
    server.sends([HELLO, "x" * 5_000_000], WSCloseCode.OK)
    stream = client.notifications()
    await anext(stream)
    with pytest.raises(PlatformUnavailable):
        await anext(stream)


class VirtualClock(SystemClock):
    """A clock that sleeps in no time and remembers for how long."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


def notification(kind: str, seq: int, **fields: object) -> str:
    """One frame."""
    base: dict[str, dict[str, object]] = {
        "new_job": {"job_id": JOB, "challenge_id": CHALLENGE},
        "job_cancelled": {"job_id": JOB},
    }
    return json.dumps({"type": kind, "seq": seq, **base.get(kind, {}), **fields})


def hello(stream: str, seq: int) -> str:
    """A hello."""
    return notification("hello", seq, stream=stream, server_time="2026-01-01T00:00:00Z")


async def heard(
    server: Scripted, client: HttpPlatformClient, scripts: list[list[str]]
) -> tuple[Heard, VirtualClock]:
    """Run the loop over scripted connections, the last of which another instance takes over."""
    listener, clock = Heard(), VirtualClock()
    left = [closing(script, 1012) for script in scripts] + [closing([], 4409)]

    async def next_one(request: web.Request) -> web.StreamResponse:
        return await left.pop(0)(request)

    server.answer = next_one
    loop = NotificationLoop(
        client=client,
        listener=listener,
        clock=clock,
        rng=random.Random(1),
    )
    await loop.run()
    return listener, clock


@pytest.mark.robustness(15, "gap")
async def test_a_new_stream_or_a_missed_seq_means_poll_now(
    server: Scripted, client: HttpPlatformClient
) -> None:
    """A new stream or a missed seq means poll now."""
    listener, _ = await heard(
        server,
        client,
        [
            [hello("s", 5), notification("new_job", 6), notification("new_job", 8)],
            [hello("s", 8), notification("job_cancelled", 9)],
            [hello("s", 12)],
            [hello("other", 12)],
        ],
    )
    assert listener.told == [
        "poll", "new_job", "new_job", "poll",
        "job_cancelled",
        "poll",
        "poll",
        "in_use",
    ]  # fmt: skip


async def test_reconnects_back_off_with_full_jitter_up_to_a_minute(
    server: Scripted, client: HttpPlatformClient
) -> None:
    """Reconnects back off with full jitter up to a minute."""
    _, clock = await heard(server, client, [[hello("s", 0)] for _ in range(12)])
    bounds = [min(2.0**n, 60.0) for n in range(12)]
    assert all(0 <= slept <= bound for slept, bound in zip(clock.slept, bounds, strict=True))
    assert len(set(clock.slept)) == len(clock.slept)
