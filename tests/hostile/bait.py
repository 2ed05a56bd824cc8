"""Secrets that attacks are after, and whether anybody opened what their links point at."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.canary.places import Canary

_IN_OPEN = 0x20
_IN_NONBLOCK = 0o4000
_READ = 65536
_ODD = re.compile(r"[^0-9A-Za-z]")


def new_canary(kind: str) -> str:
    """A secret that is found by its letters alone, however it was taken to pieces."""
    return f"canary{kind}{secrets.token_hex(16)}"


def found_in(canaries: Iterable[Canary], text: str) -> tuple[str, ...]:
    """Those whose secret is in a text: in one piece, encoded, backwards, or with other characters between."""
    joined = _ODD.sub("", text)
    found = set()
    for canary in canaries:
        word = canary.secret.decode("latin-1")
        forms = [form.decode("latin-1") for form in canary.forms()]
        if any(form in text for form in forms) or _ODD.sub("", word) in joined or word[::-1] in text:
            found.add(canary.name)
    return tuple(sorted(found))


@dataclass(slots=True)
class Bait:
    """A file on the host that everyone may read, and a count of how often it was opened."""

    path: Path
    _watch: int = field(init=False)

    def __post_init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._watch = libc.inotify_init1(_IN_NONBLOCK)
        if self._watch < 0 or libc.inotify_add_watch(self._watch, os.fsencode(self.path), _IN_OPEN) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify: {os.strerror(number)}")

    def opened(self) -> int:
        """How often since the last call."""
        try:
            data = os.read(self._watch, _READ)
        except BlockingIOError:
            return 0
        events, at = 0, 0
        while at < len(data):
            length = struct.unpack_from("=iIII", data, at)[3]
            at += struct.calcsize("=iIII") + length
            events += 1
        return events

    def close(self) -> None:
        """No more."""
        os.close(self._watch)
