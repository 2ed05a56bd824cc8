"""The operator's side of what CVMs may reach."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """The operator's: `allow_outbound` with no hosts allows nothing."""

    allow_outbound: bool
    hosts: tuple[str, ...]
    ports: tuple[int, ...]

    @property
    def allows_something(self) -> bool:
        """Whether any CVM can reach anything by it."""
        return self.allow_outbound and bool(self.hosts) and bool(self.ports)
