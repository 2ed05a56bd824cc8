"""What the daemon and the egress proxy say to each other over the inherited socket: a JSON object a line.

The daemon says `start` once, then `allow` and `forget`; the proxy `ready` or `failed`, then `refused` and,
every second, `counts`. When the daemon's end closes, the proxy ends.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from platform_protocol.ids import VmName
from platform_validator.egress.refusals import Reason

MAX_LINE = 1024 * 1024
COUNTS_EVERY = 1.0


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def line(self) -> bytes:
        """As it is sent."""
        return self.model_dump_json().encode() + b"\n"


class Start(_Line):
    """First of all. `denied` are further networks that nothing is connected to; limits as `EgressLimits`."""

    say: Literal["start"] = "start"
    listen: tuple[str, int]
    dns_servers: tuple[tuple[str, int], ...] = ()
    denied: tuple[str, ...] = ()
    connections: int
    bytes: int
    rate: int
    all_connections: int


class Allow(_Line):
    """A CVM may reach these. `password` is HMAC(L, "proxy"), hex; never L itself."""

    say: Literal["allow"] = "allow"
    vm: VmName
    password: str = Field(repr=False)
    hosts: tuple[str, ...]
    ports: tuple[int, ...]


class Forget(_Line):
    """A CVM may reach nothing any more."""

    say: Literal["forget"] = "forget"
    vm: VmName


class Ready(_Line):
    """The proxy listens."""

    say: Literal["ready"] = "ready"
    listen: tuple[str, int]


class Failed(_Line):
    """The proxy cannot run, and ends."""

    say: Literal["failed"] = "failed"
    error: str


class RefusedRequest(_Line):
    """A refusal to be logged; `more`: how many of the same CVM and reason were not told before it."""

    say: Literal["refused"] = "refused"
    vm: str
    reason: Reason
    target: str
    more: int = 0


class VmCounts(_Line):
    """What a CVM has done since it was allowed."""

    connections: int = 0
    open: int = 0
    sent: int = 0
    received: int = 0
    refused: dict[str, int] = Field(default_factory=dict)


class Counts(_Line):
    """All CVMs that are known now; a sign of life as well."""

    say: Literal["counts"] = "counts"
    vms: dict[VmName, VmCounts]
    unauthenticated: int


Told = Annotated[Start | Allow | Forget, Field(discriminator="say")]
Said = Annotated[Ready | Failed | RefusedRequest | Counts, Field(discriminator="say")]
TOLD: TypeAdapter[Start | Allow | Forget] = TypeAdapter(Told)
SAID: TypeAdapter[Ready | Failed | RefusedRequest | Counts] = TypeAdapter(Said)
