"""Host ports for CVMs: each is given to one CVM at a time, round and round through the range."""

from __future__ import annotations

from platform_validator.errors import ValidatorError


class NoHostPort(ValidatorError):
    """Every port of the range is in use."""


class HostPorts:
    """The ports `first` to `last`, both included."""

    def __init__(self, first: int, last: int) -> None:
        self._first = first
        self._last = last
        self._next = first
        self._taken: set[int] = set()

    def take(self) -> int:
        """A port that no CVM of ours has.

        Raises:
            NoHostPort: All are taken.
        """
        for _ in range(self._last - self._first + 1):
            port = self._next
            self._next = self._first if port >= self._last else port + 1
            if port not in self._taken:
                self._taken.add(port)
                return port
        raise NoHostPort(
            f"every host port of {self._first}-{self._last} is in use: widen [dstack] port_range"
        )

    def hold(self, port: int) -> None:
        """A CVM from before a restart has it."""
        self._taken.add(port)

    def give_back(self, port: int) -> None:
        """Its CVM is gone."""
        self._taken.discard(port)
