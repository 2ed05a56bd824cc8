"""The process in the middle: takes the validator's connections, connects to a guest, and runs one attack."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from tests.mitm.attack import Attack, Receive
from tests.mitm.catalogue import catalogue
from tests.mitm.passing import Cut, Frame, Passing
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection as Socket
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

_MAX = 64 * 1024 * 1024
_ASIDE = 20.0
_NO_CODES = (None, 1005, 1006, 1015)
_LIKE: dict[str, Any] = {"max_size": _MAX, "compression": None, "ping_interval": None, "proxy": None}


@dataclass(frozen=True, slots=True)
class Plan:
    """What he is to do, and between whom. `known_secret`: another VM's launch secret, which he knows.

    `settle`: seconds that whoever refused has, at the end, to hang up.
    """

    attack: str
    old: bool
    port: int
    guests: tuple[int, ...]
    known_secret: bytes
    settle: float


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it.

    Args:
        connections: That the validator made.
        tampered: Frames that were not as sent, or not where they belong, and were delivered.
        survived: Connections that went on after one, if it was sealed by an end, or (version 2) at all.
        closed: The codes with which ends closed.
        seen: All that he saw or could decrypt.
    """

    connections: int
    tampered: int
    survived: int
    closed: tuple[int | None, ...]
    seen: bytes


@dataclass(slots=True)
class _Wire:
    number: int
    validator: ServerConnection
    guest: ClientConnection
    tampered: int = 0
    ended: bool = False


@dataclass(slots=True)
class _Man:
    plan: Plan
    attack: Attack
    wires: list[_Wire] = field(default_factory=list)
    dialled: int = 0
    tampered: int = 0
    taken: int = 0
    playing: int = 0
    closed: list[int | None] = field(default_factory=list)
    seen: list[bytes] = field(default_factory=list)
    asides: list[asyncio.Task[None]] = field(default_factory=list)

    async def run(self, harness: Connection) -> None:
        async with serve(
            self._meet,
            "127.0.0.1",
            self.plan.port,
            max_size=_MAX,
            compression=None,
            ping_interval=None,
            close_timeout=1,
        ):
            harness.send("ready")
            await asyncio.to_thread(harness.recv)
            await asyncio.gather(*self.asides)
            await self._settle()
            harness.send(self._report())
            await asyncio.to_thread(harness.recv)

    async def _settle(self) -> None:
        """Whoever refused over what he sent has a moment to end the connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.plan.settle):
                while self._going_on():
                    await asyncio.sleep(0.01)

    def _going_on(self) -> int:
        return self.playing + sum(wire.tampered > 0 and not wire.ended for wire in self.wires)

    def _report(self) -> Report:
        counts = self.attack.authentic or not self.plan.old
        return Report(
            connections=self.dialled,
            tampered=self.tampered + sum(wire.tampered for wire in self.wires),
            survived=(self._going_on() if counts else 0) + self.taken,
            closed=tuple(self.closed),
            seen=b"\n".join([*self.seen, *self.attack.learned]),
        )

    async def _meet(self, validator: ServerConnection) -> None:
        number, self.dialled = self.dialled, self.dialled + 1
        if self.attack.answers(number):
            await self._answer(validator)
            return
        async with connect(self._address(self.attack.target(number)), **_LIKE) as guest:
            wire = _Wire(number, validator, guest)
            self.wires.append(wire)
            await asyncio.gather(self._pump(wire, up=True), self._pump(wire, up=False))

    async def _pump(self, wire: _Wire, *, up: bool) -> None:
        source, other = (wire.validator, wire.guest) if up else (wire.guest, wire.validator)
        count = 0
        with contextlib.suppress(ConnectionClosed):
            async for frame in source:
                self._see(frame)
                await self._forward(wire, Passing(wire.number, up, count, frame))
                count += 1
                if self.attack.dials() and (up, count) == (False, 3) and not self.asides:
                    self.asides.append(asyncio.create_task(self._dial()))
        wire.ended = True
        if not up:
            self.closed.append(source.close_code)
        code = source.close_code
        await other.close(1011 if code in _NO_CODES or code is None else code)

    async def _forward(self, wire: _Wire, passing: Passing) -> None:
        for move in self.attack.pass_on(passing):
            if isinstance(move, Cut):
                wire.validator.transport.abort()
                wire.guest.transport.abort()
                return
            wire.tampered += move.tampered
            await (wire.guest if move.up else wire.validator).send(move.frame)

    async def _answer(self, validator: ServerConnection) -> None:
        self.tampered += 1
        self.playing += 1
        with contextlib.suppress(ConnectionClosed):
            await self.attack.answer(validator.send, self._receive_from(validator))
            await validator.wait_closed()
        self.playing -= 1

    async def _dial(self) -> None:
        """A guest that answers, instead of closing, took what it should not."""
        self.tampered += 1
        try:
            async with (
                asyncio.timeout(_ASIDE),
                connect(self._address(0), **_LIKE) as guest,
            ):
                try:
                    await self.attack.dial(guest.send, self._receive_from(guest))
                    self.taken += 1
                except ConnectionClosed:
                    self.closed.append(guest.close_code)
        except TimeoutError:
            self.taken += 1

    def _receive_from(self, socket: Socket) -> Receive:
        async def receive() -> Frame:
            frame = await socket.recv()
            self._see(frame)
            return frame

        return receive

    def _see(self, frame: Frame) -> None:
        self.seen.append(frame.encode() if isinstance(frame, str) else frame)

    def _address(self, guest: int) -> str:
        return f"ws://127.0.0.1:{self.plan.guests[guest]}/sdk/ws"


def main(plan: Plan, harness: Connection) -> None:
    """Until told to report and to end."""
    attack = catalogue()[plan.attack](old=plan.old, known_secret=plan.known_secret)
    asyncio.run(_Man(plan, attack).run(harness))
