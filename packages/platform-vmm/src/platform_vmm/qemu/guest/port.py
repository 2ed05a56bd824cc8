"""The control port to the VMM: one JSON object a line, over virtio-serial."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

_CHUNK = 65_536


class PortClosed(Exception):
    """The VMM is gone."""


class Port:
    """Both directions of the port. Any thread may send; one receives."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._sending = threading.Lock()  # a line must not be torn by another thread's
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Send one message.

        Raises:
            OSError: The VMM is gone.
        """
        data = json.dumps(message).encode() + b"\n"
        with self._sending:
            while data:
                data = data[os.write(self._descriptor, data) :]

    def receive(self) -> dict[str, Any]:
        """Wait for the next message.

        Raises:
            PortClosed: The VMM is gone.
        """
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            chunk = os.read(self._descriptor, _CHUNK)
            if not chunk:
                raise PortClosed
            parts.append(chunk)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
