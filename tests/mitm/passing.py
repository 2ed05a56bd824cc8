"""What an attack sees and does: frames that pass, and what is sent instead."""

from __future__ import annotations

from dataclasses import dataclass

Frame = str | bytes


@dataclass(frozen=True, slots=True)
class Passing:
    """A frame on its way.

    Args:
        connection: Counted from 0, as the validator dials.
        up: Whether it goes to the guest.
        number: Counted from 0 in its direction, the handshake's frames included.
        frame: As it came.
    """

    connection: int
    up: bool
    number: int
    frame: Frame


@dataclass(frozen=True, slots=True)
class Move:
    """A frame to send. `tampered`: whoever gets it must end the connection over it."""

    up: bool
    frame: Frame
    tampered: bool = False


class Cut:
    """Break the connection, on both sides."""


CUT = Cut()
Moves = list[Move | Cut]
