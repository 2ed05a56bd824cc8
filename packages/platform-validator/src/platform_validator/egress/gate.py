"""The port through which the fleet opens the way out for its CVMs, and the one that opens nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from platform_protocol.ids import VmName
from platform_protocol.spec import NetworkSpec
from platform_validator.host_name import DEFAULT_HOST, HostName


@dataclass(slots=True)
class EgressUse:
    """What a CVM reached so far, in numbers; `refused` by reason."""

    connections: int = 0
    open: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    refused: dict[str, int] = field(default_factory=dict)


class EgressGate(Protocol):
    """None of the methods waits, or fails: what cannot be told now is told when it can be."""

    def allow(
        self, vm: VmName, secret: bytes, wanted: NetworkSpec, *, host: HostName = DEFAULT_HOST
    ) -> str | None:
        """Open the way out for a CVM, as far as the operator's policy goes.

        Args:
            vm: Its name.
            secret: Its launch secret L; the password is made of it, and it goes no further.
            wanted: What its challenge declares.
            host: Where it is: hosts reach the proxy at addresses of their own.

        Returns:
            Its `proxy_url`; None: nothing may go out.
        """

    def forget(self, vm: VmName) -> None:
        """A CVM is on its way out: its connections are cut. What it used is still known."""

    def gone(self, vm: VmName) -> None:
        """A CVM is gone, and what it used forgotten."""

    def use(self, vm: VmName) -> EgressUse | None:
        """What a CVM reached; None: it may reach nothing."""


class ClosedGate:
    """Nothing goes out."""

    def allow(
        self, vm: VmName, secret: bytes, wanted: NetworkSpec, *, host: HostName = DEFAULT_HOST
    ) -> str | None:
        """See the port."""
        del vm, secret, wanted, host
        return None

    def forget(self, vm: VmName) -> None:
        """See the port."""

    def gone(self, vm: VmName) -> None:
        """See the port."""

    def use(self, vm: VmName) -> EgressUse | None:
        """See the port."""
        del vm
        return None
