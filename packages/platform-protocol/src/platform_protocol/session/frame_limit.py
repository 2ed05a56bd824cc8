"""How large a message a WebSocket takes: little until its other end has proved itself, then more."""

from __future__ import annotations

from typing import Any


def take_messages_of(connection: Any, most: int) -> None:
    """Have a connection of `websockets` take messages of up to `most` bytes from the next one on.

    The library has no call for it: its protocol object keeps the limit that it was made with, under another
    name up to version 15.

    Raises:
        AttributeError: It keeps none under either name: frames would be cut off at the size of a handshake.
    """
    name = "max_message_size" if hasattr(connection.protocol, "max_message_size") else "max_size"
    getattr(connection.protocol, name)
    setattr(connection.protocol, name, most)
