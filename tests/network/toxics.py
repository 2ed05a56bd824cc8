"""What a `TcpProxy` does to the bytes that pass; the names are Toxiproxy's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Direction(Enum):
    """Which way bytes flow."""

    UPSTREAM = "upstream"
    """Client to server: requests."""
    DOWNSTREAM = "downstream"
    """Server to client: answers."""


BOTH = (Direction.UPSTREAM, Direction.DOWNSTREAM)


@dataclass(frozen=True, slots=True)
class Latency:
    """Each piece arrives `seconds`, give or take `jitter` seconds, after it was sent; never out of order."""

    seconds: float
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Down:
    """Nobody listens: connections are refused, and those that stood are closed."""


@dataclass(frozen=True, slots=True)
class BlackHole:
    """Connections are accepted and stay open, and what is sent is lost.

    When it ends, connections that lost something are reset: a stream with a hole in it cannot go on.
    """


@dataclass(frozen=True, slots=True)
class Reset:
    """Both ends get an RST once `after_bytes` have passed; with 0 at once, or as soon as they connect."""

    after_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Slicer:
    """Pieces of `size` bytes, each sent on its own, `delay` seconds apart."""

    size: int = 1
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """At most so many bytes a second, on each connection."""

    bytes_per_second: int


@dataclass(frozen=True, slots=True)
class Limit:
    """Both ends are closed in good order (FIN) once `after_bytes` have passed on a connection."""

    after_bytes: int


Toxic = Latency | Down | BlackHole | Reset | Slicer | Bandwidth | Limit
