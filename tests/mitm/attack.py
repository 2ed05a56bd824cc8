"""What a man in the middle does; without changes he passes everything on, and reads it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tests.mitm.passing import Frame, Move, Moves, Passing

Send = Callable[[Frame], Awaitable[None]]
Receive = Callable[[], Awaitable[Frame]]


class Attack:
    """The honest relay, and the base of all that are none.

    `old`: the guest speaks version 1, whose frames are counted otherwise. `authentic`: what is sent was
    sealed by one of the ends, so that going on after it means that it was accepted. `learned`: plaintext
    that was decrypted.
    """

    authentic = False

    def __init__(self, *, old: bool, known_secret: bytes) -> None:
        self.old = old
        self.known_secret = known_secret
        self.learned: list[bytes] = []

    def target(self, connection: int) -> int:
        """Which guest the validator is connected to: 0 is its own."""
        del connection
        return 0

    def pass_on(self, passing: Passing) -> Moves:
        """What is sent when a frame comes."""
        return [Move(passing.up, passing.frame)]

    def answers(self, connection: int) -> bool:
        """Whether he answers the validator himself, by `answer`, and connects to no guest."""
        del connection
        return False

    async def answer(self, send: Send, receive: Receive) -> None:
        """Play the guest."""
        raise NotImplementedError

    def dials(self) -> bool:
        """Whether he dials the guest himself, by `dial`, while the validator's connection is up."""
        return False

    async def dial(self, send: Send, receive: Receive) -> None:
        """Play the validator. Returns if the guest took it; a guest that does not ends the connection."""
        raise NotImplementedError

    def site(self, *, up: bool) -> int:
        """The number of the frame to attack, within the sealed ones: each after the peer's first."""
        if up:
            return 3
        return 2 if self.old else 3
