"""The relay between a guest and the host: how many connections a guest may hold."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Iterator

import pytest
from waiting import until

from platform_vmm.sandbox.relay import Relay


@pytest.mark.robustness(26, "slow-loris")
async def test_a_guest_holds_so_many_connections_and_no_more() -> None:
    """One more is closed at once and reaches nobody; when one ends, there is room for another."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    address = listener.getsockname()
    reached: list[socket.socket] = []

    async def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        reached.append(theirs)
        return ours

    relay = Relay(connect, 2)
    await relay.start(listener)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(relay.close)
        held = [await asyncio.open_connection(*address) for _ in range(2)]
        async with asyncio.timeout(20):
            await until(lambda: len(reached) >= 2)
            reader, writer = await asyncio.open_connection(*address)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            assert (len(reached), relay.refused) == (2, 1)
            for theirs in reached:
                theirs.close()
            for reader, writer in held:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
            while len(reached) < 3:
                _, writer = await asyncio.open_connection(*address)
                await asyncio.sleep(0.01)
                writer.close()
        for theirs in reached:
            theirs.close()


@pytest.fixture
def scarce() -> Iterator[int]:
    """This process may have so many descriptors, a few dozen more than it has."""
    lowest = os.dup(0)
    os.close(lowest)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = (lowest + 40) * 4 // 3
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    yield most
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.robustness(26, "slow-loris")
async def test_guests_cannot_take_the_vmm_s_last_descriptors(scarce: int) -> None:
    """However few it was given, it can still open what it works with, and goes on when there is room."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    address = listener.getsockname()
    reached: list[socket.socket] = []

    async def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        reached.append(theirs)
        return ours

    relay = Relay(connect)
    await relay.start(listener)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(relay.close)
        held: list[asyncio.StreamWriter] = []
        async with asyncio.timeout(20):
            while not relay.refused:
                held.append((await asyncio.open_connection(*address))[1])
                await asyncio.sleep(0.01)
            spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
            assert 3 < len(reached) < scarce
            before = len(reached)
            for descriptor in spare:
                os.close(descriptor)
            for writer in held:
                writer.close()
            for theirs in reached:
                theirs.close()
            while len(reached) == before:
                _, writer = await asyncio.open_connection(*address)
                await asyncio.sleep(0.01)
                writer.close()
        for theirs in reached[before:]:
            theirs.close()
