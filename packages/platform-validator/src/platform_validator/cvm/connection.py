"""One connection to the SDK in a CVM: dialled, shaken hands over, and judged before anything goes in."""

from __future__ import annotations

import contextlib
from asyncio import timeout
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from platform_protocol.ids import Hotkey, VmName
from platform_protocol.session.channel import SealedChannel
from platform_protocol.session.errors import AttestationRejected, HandshakeInvalid, SessionError
from platform_protocol.session.frame_limit import take_messages_of
from platform_protocol.session.v1 import MAX_ENVELOPE, EnvelopeChannel
from platform_protocol.session.v2 import MAX_RESPONSE, Offer, ValidatorHandshake
from platform_validator.cvm.errors import AttestationRefused, AttestationUnavailable, SessionRefused
from platform_validator.cvm.vmm import url_of

Judge = Callable[[Offer], Awaitable[None]]
"""Accepts an offer, or raises AttestationRefused or AttestationUnavailable."""
Channel = SealedChannel | EnvelopeChannel

_MAX_QUEUE = 2
"""Frames that wait to be read; then the guest waits."""
_AUTH_REFUSED = 4403


@dataclass(frozen=True, slots=True)
class SessionPace:
    """How long a session waits, in seconds.

    Args:
        dial: For the TCP and WebSocket handshake.
        handshake: For attestation, collateral included.
        send: For one frame to leave.
        ping: Between two pings; three unanswered ones end the connection.
        resume_for: How long a CVM that cannot be reached is dialled before it is given up.
        retry: The first pause between two dials; doubled up to `retry_most`.
        retry_most: The longest.
        rekey: How old one connection's keys may become; then it is resumed over a new one.
    """

    dial: float = 10.0
    handshake: float = 60.0
    send: float = 30.0
    ping: float = 30.0
    resume_for: float = 60.0
    retry: float = 0.1
    retry_most: float = 2.0
    rekey: float = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Callee:
    """Whom a session calls, and as whom.

    Args:
        address: (host, port) of the mapped SDK port. Never trusted.
        vm: The name that we gave.
        launch_secret: L of this VM.
        session_id: Journaled with the VM, so that a later process can resume.
        validator: Our address.
        allow_v1: Whether version 1 is spoken with a challenge that knows no other.
    """

    address: tuple[str, int]
    vm: VmName
    launch_secret: bytes = field(repr=False)
    session_id: str
    validator: Hotkey
    allow_v1: bool = False


async def dial(
    callee: Callee, *, resume: bool, judge: Judge, pace: SessionPace
) -> tuple[ClientConnection, Channel]:
    """Connect, shake hands, judge, accept.

    Raises:
        AttestationRefused: The judge refused.
        AttestationUnavailable: It could not be judged.
        SessionRefused: The SDK does not know our launch secret, or rejected us, or (at the first dial) what
            answers is not the SDK of this VM.
        SessionError, WebSocketException, TimeoutError, OSError: Not now; dial again.
    """
    async with timeout(pace.dial):
        socket = await connect(
            f"{url_of(callee.address, 'ws')}/sdk/ws",
            open_timeout=pace.dial,
            close_timeout=2,
            ping_interval=None,
            compression=None,
            max_size=MAX_RESPONSE,
            max_queue=_MAX_QUEUE,
            proxy=None,
        )
    try:
        async with timeout(pace.handshake):
            return socket, await _shake_hands(socket, callee, resume, judge)
    except ConnectionClosed as error:
        await abandon(socket)
        if error.rcvd is not None and error.rcvd.code == _AUTH_REFUSED:
            raise SessionRefused(f"what answers for {callee.vm} does not know its launch secret") from error
        raise
    except AttestationRejected as error:
        await abandon(socket)
        raise SessionRefused(str(error)) from error
    except HandshakeInvalid as error:
        await abandon(socket)
        if resume:
            raise
        raise SessionRefused(f"{callee.vm}: {error}") from error
    except BaseException:
        await abandon(socket)
        raise


async def abandon(socket: ClientConnection) -> None:
    """Close without ceremony."""
    socket.transport.abort()
    with contextlib.suppress(WebSocketException, TimeoutError, OSError):
        async with timeout(2):
            await socket.wait_closed()


def text_of(frame: str | bytes) -> str:
    """A text frame. Raises SessionError for another."""
    if isinstance(frame, bytes):
        raise SessionError("expected a text frame")
    return frame


def bytes_of(frame: str | bytes) -> bytes:
    """A binary frame. Raises SessionError for another."""
    if isinstance(frame, str):
        raise SessionError("expected a binary frame")
    return frame


async def _shake_hands(socket: ClientConnection, callee: Callee, resume: bool, judge: Judge) -> Channel:
    handshake = ValidatorHandshake(
        launch_secret=callee.launch_secret,
        vm=callee.vm,
        validator=callee.validator,
        session_id=callee.session_id,
        resume=resume,
        allow_v1=callee.allow_v1,
    )
    await socket.send(handshake.begin())
    offer = handshake.receive(text_of(await socket.recv()))
    try:
        await judge(offer)
    except (AttestationRefused, AttestationUnavailable) as error:
        with contextlib.suppress(WebSocketException):
            await socket.send(handshake.reject(type(error).__name__))
        raise
    accepted, channel = handshake.accept()
    if isinstance(channel, EnvelopeChannel):
        # Version 1 says nothing before its first message.
        take_messages_of(socket, MAX_ENVELOPE)
    await socket.send(accepted)
    return channel
