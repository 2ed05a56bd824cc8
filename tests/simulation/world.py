"""What every part of one seed's world shares: the dice, the trace, and what has gone wrong."""

from __future__ import annotations

import asyncio
import hashlib
import random
import zlib
from collections import Counter
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass, field

from tests.simulation.virtual import passing


class Dead(BaseException):
    """This life of a validator is over: whatever still runs of it reaches nothing any more.

    Derives from BaseException because no handler of the validator may survive its own death.
    """


class Life:
    """One life of a validator's process. Its ports ask it before and after each step."""

    def __init__(self, node: int) -> None:
        self.node = node
        self.alive = True
        self.frozen_until = 0.0
        self.grants: set[str] = set()
        self.root: asyncio.Task[object] | None = None
        self.stored_in_slots: Callable[[], Collection[str]] = tuple

    def check(self) -> None:
        """Raise Dead once it is over."""
        if not self.alive:
            raise Dead

    def end(self) -> None:
        """A kill -9."""
        if self.alive:
            self.alive = False
            if self.root is not None:
                self.root.cancel()

    async def pause(self, seconds: float) -> None:
        """Time that a call takes; longer while the process is stopped (SIGSTOP)."""
        await passing(seconds)
        while self.alive and (left := self.frozen_until - asyncio.get_running_loop().time()) > 0:
            await passing(left)
        self.check()


LIFE: ContextVar[Life | None] = ContextVar("life", default=None)
"""Whose code is running; None: the world's own."""


@dataclass(slots=True)
class Dice:
    """All chance of one seed. Each user has a stream of its own, so that one more throw moves no other."""

    seed: int

    def stream(self, name: str) -> random.Random:
        """A stream by name."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return random.Random(int.from_bytes(digest, "big"))


@dataclass(slots=True)
class Book:
    """What happened: counts, a digest of the order of events, and violations."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    tail: list[str] = field(default_factory=list)
    keep: int = 0
    until: str | None = None
    _digest: int = 0

    def note(self, what: str) -> None:
        """An event; the digest of all of them is what a replay must repeat."""
        line = f"{asyncio.get_running_loop().time():.3f} {what}"
        self._digest = (self._digest * 1_000_003 + zlib.crc32(line.encode())) & 0xFFFFFFFFFFFFFFFF
        if self.keep:
            self.tail.append(line)
            del self.tail[: -self.keep]

    def violated(self, law: str, what: str) -> None:
        """A law was broken."""
        self.note(f"VIOLATION {law}: {what}")
        self.found(law, what, f"t={asyncio.get_running_loop().time():.1f} ")

    def found(self, law: str, what: str, when: str = "") -> None:
        """A law was broken, at the end of everything or while nothing runs."""
        self.broken[law] += 1
        self.violations.append(f"{when}{law}: {what}")

    @property
    def digest(self) -> str:
        """Of all events so far."""
        return f"{self._digest:016x}"
