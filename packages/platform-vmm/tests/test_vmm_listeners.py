"""What listens for a VM is closed in a way that the event loop notices, also when its beginning is cancelled.

A socket that is closed behind the loop's back stays known to it under its number. The next socket of that
number is then never looked at: a VMM that answers no more.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from platform_vmm.agent import AgentFacts, GuestAgent
from platform_vmm.qemu.link import Link
from platform_vmm.sandbox.relay import Relay

Listening = tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]
"""How one begins to listen, and how it ends."""


async def _nowhere(*_: object) -> socket.socket:
    raise OSError


def _relay(_: Path) -> Listening:
    relay = Relay(_nowhere)
    return lambda: relay.start(socket.create_server(("127.0.0.1", 0))), relay.close


def _agent(folder: Path) -> Listening:
    facts: Any = dict.fromkeys(AgentFacts.__slots__)
    agent = GuestAgent(AgentFacts(**facts))
    return lambda: agent.start(folder / "agent.sock"), agent.close


def _link(folder: Path) -> Listening:
    link = Link("vm", dial=_nowhere, targets={})
    return lambda: link.listen(folder / "port.sock"), link.close


@pytest.mark.parametrize("made", [_relay, _agent, _link])
async def test_after_a_beginning_that_was_cancelled_the_next_sockets_are_heard(
    made: Callable[[Path], Listening], tmp_path: Path
) -> None:
    """Each of the next listeners, one of which has the number of the one that was closed, accepts."""
    begin, end = made(tmp_path)
    beginning = asyncio.ensure_future(begin())
    await asyncio.sleep(0)  # to its first wait, where it listens already
    beginning.cancel()
    await asyncio.wait({beginning})
    assert beginning.cancelled()
    await end()

    heard = asyncio.Semaphore(0)

    def hear(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.release()
        writer.close()

    servers = [await asyncio.start_server(hear, "127.0.0.1", 0) for _ in range(8)]
    async with asyncio.timeout(20):
        for server in servers:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await heard.acquire()
            writer.close()
    for server in servers:
        server.close()
