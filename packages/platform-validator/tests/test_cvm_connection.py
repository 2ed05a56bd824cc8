"""The connection to a guest: what it may send at once."""

from __future__ import annotations

import uuid

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from platform_protocol.ids import Hotkey, VmName
from platform_protocol.session.v2 import MAX_RESPONSE, Offer
from platform_validator.cvm.connection import Callee, SessionPace, dial


async def accept(_: Offer) -> None:
    """Accept any."""


@pytest.mark.robustness(26, "oversized-frame")
async def test_a_frame_beyond_the_limit_ends_the_connection_unread() -> None:
    """Of the handshake, where they are small: the library closes with 1009 at the frame's header."""

    async def flood(guest: ServerConnection) -> None:
        await guest.recv()
        await guest.send(bytes(MAX_RESPONSE + 1))

    async with serve(flood, "127.0.0.1", 0, compression=None) as server:
        address = next(iter(server.sockets)).getsockname()[:2]
        callee = Callee(address, VmName("pv-1"), bytes(32), str(uuid.uuid4()), Hotkey("5DDexample"))
        with pytest.raises(ConnectionClosed) as caught:
            await dial(callee, resume=False, judge=accept, pace=SessionPace())
    assert caught.value.sent is not None
    assert caught.value.sent.code == CloseCode.MESSAGE_TOO_BIG
