"""The relay between a guest and the host: how many connections a guest may hold."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

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
            while len(reached) < 2:
                await asyncio.sleep(0)
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
