"""Attacks on frames: repeated, reordered, reflected, left out, cut, and changed."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.mitm.attack import Attack
from tests.mitm.passing import CUT, Frame, Move, Moves, Passing


class OnOneFrame(Attack):
    """Attacks one sealed frame in one direction, over the first connection."""

    def __init__(self, up: bool, **how: Any) -> None:
        super().__init__(**how)
        self.up = up

    def pass_on(self, passing: Passing) -> Moves:
        here = (passing.connection, passing.up, passing.number)
        if here == (0, self.up, self.site(up=self.up)):
            return self.attack(passing.frame)
        return super().pass_on(passing)

    def attack(self, frame: Frame) -> Moves:
        """What is sent instead."""
        raise NotImplementedError


class Replay(OnOneFrame):
    """The frame, twice."""

    authentic = True

    def attack(self, frame: Frame) -> Moves:
        return [Move(self.up, frame), Move(self.up, frame, tampered=True)]


class Reflect(OnOneFrame):
    """The frame, and back to its sender too."""

    authentic = True

    def attack(self, frame: Frame) -> Moves:
        return [Move(self.up, frame), Move(not self.up, frame, tampered=True)]


class Changed(OnOneFrame):
    """The frame after `change`."""

    def __init__(self, up: bool, change: str, **how: Any) -> None:
        super().__init__(up, **how)
        self.change = change

    def attack(self, frame: Frame) -> Moves:
        return [Move(self.up, changed(frame, self.change), tampered=True)]


class Reorder(Attack):
    """Two frames change places."""

    authentic = True

    def __init__(self, up: bool, **how: Any) -> None:
        super().__init__(**how)
        self.up = up
        self.held: Frame | None = None

    def site(self, *, up: bool) -> int:
        # To a guest of version 2, `configure` would be waited for; of version 1 there are but two.
        return (2 if self.old else 4) if up else super().site(up=up)

    def pass_on(self, passing: Passing) -> Moves:
        if (passing.connection, passing.up) != (0, self.up):
            return super().pass_on(passing)
        if passing.number == self.site(up=self.up):
            self.held = passing.frame
            return []
        if self.held is not None:
            held, self.held = self.held, None
            return [Move(self.up, passing.frame, tampered=True), Move(self.up, held)]
        return super().pass_on(passing)


class Drop(Reorder):
    """A frame is left out: what comes after it must not be taken."""

    def pass_on(self, passing: Passing) -> Moves:
        if self.held is not None and (passing.connection, passing.up) == (0, self.up):
            self.held = None
            return [Move(self.up, passing.frame, tampered=True)]
        return super().pass_on(passing)


class CutOff(Attack):
    """The connection is broken in the middle of the job: an honest resume, and the result once."""

    def pass_on(self, passing: Passing) -> Moves:
        here = (passing.connection, passing.up, passing.number)
        if here == (0, False, self.site(up=False)):
            return [CUT]
        return super().pass_on(passing)


class ReplayOld(CutOff):
    """A frame of the connection before, which was cut."""

    authentic = True

    def __init__(self, up: bool, **how: Any) -> None:
        super().__init__(**how)
        self.up = up
        self.kept: Frame = b""

    def pass_on(self, passing: Passing) -> Moves:
        at_site = (passing.up, passing.number) == (self.up, 2)
        if at_site and passing.connection == 0:
            self.kept = passing.frame
        if at_site and passing.connection == 1:
            return [Move(self.up, self.kept, tampered=True), Move(self.up, passing.frame)]
        return super().pass_on(passing)


def changed(frame: Frame, change: str) -> Frame:
    """A sealed frame after `truncate`, `empty`, or a bit flipped `first`, `middle` or `last`."""
    if isinstance(frame, bytes):
        return _changed(frame, change)
    try:
        envelope = json.loads(frame)
        raw = base64.b64decode(envelope["ciphertext"])
    except (ValueError, KeyError, TypeError):
        return frame[:-1]
    return json.dumps(envelope | {"ciphertext": base64.b64encode(_changed(raw, change)).decode()})


def _changed(raw: bytes, change: str) -> bytes:
    if change == "empty":
        return b""
    if change == "truncate":
        return raw[:-1]
    at = {"first": 0, "middle": len(raw) // 2, "last": len(raw) - 1}[change]
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
