"""HTTP to our own parts: over a Unix socket, and whether something answers."""

from __future__ import annotations

import http.client
import socket
import urllib.request
from pathlib import Path

TIMEOUT = 10
"""Seconds for one answer of a part on this machine."""


class UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(str(self._path))


def answers(url: str) -> bool:
    """Whether it says 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - our own loopback URL
            return bool(answer.status == http.client.OK)
    except (OSError, http.client.HTTPException):
        return False
