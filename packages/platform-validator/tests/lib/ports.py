"""Ports of loopback that nobody listens on now."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """One of them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def free_range(count: int, among: tuple[int, int] = (20_000, 30_000)) -> tuple[int, int]:
    """The first and the last of so many in a row."""
    while True:
        first = random.randrange(among[0], among[1] - count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first, first + count - 1
