"""Free TCP ports for a part that is started in a moment."""

from __future__ import annotations

import random
import socket

_FIRST, _LAST = 20_000, 32_000
"""Above the host ports of CVMs, below those that Linux gives to outgoing connections (from 32768): such a
connection, of whatever runs beside us, would take the port before its part listens."""


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nobody listens on just now."""
    found: list[int] = []
    for port in random.sample(range(_FIRST, _LAST), _LAST - _FIRST):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"of the ports {_FIRST} to {_LAST} fewer than {count} are free")
