"""Tells systemd how the daemon is: sd_notify(3), without libsystemd; without systemd it is silent."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from datetime import timedelta

import structlog

_log = structlog.get_logger(__name__)


class Systemd:
    """The notification socket of the service manager.

    Args:
        address: NOTIFY_SOCKET: a path, or `@name` in the abstract namespace; None: nobody listens.
        watchdog: Within what it wants to hear of us, or None.
    """

    def __init__(self, address: str | None, watchdog: timedelta | None = None) -> None:
        self.watchdog = watchdog if address else None
        self._address = "\0" + address[1:] if address and address[0] == "@" else address
        self._socket: socket.socket | None = None
        self._failed = False
        if address and address[0] not in "/@":
            _log.warning("notify_socket_unknown", address=address, expected="a path, or @name")
            self._address = self.watchdog = None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], *, pid: int) -> Systemd:
        """As NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID say; a watchdog of another process is not ours."""
        usec, of = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(pid))
        asked = usec.isdecimal() and int(usec) > 0 and of == str(pid)
        watchdog = timedelta(microseconds=int(usec)) if asked else None
        return cls(environment.get("NOTIFY_SOCKET") or None, watchdog)

    def ready(self) -> None:
        """The start, or a reload, is done."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell("RELOADING=1", f"MONOTONIC_USEC={usec}")

    def stopping(self, within: timedelta) -> None:
        """The end begins, and may take that long, whatever TimeoutStopSec says."""
        usec = int(within.total_seconds() * 1_000_000)
        self._tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={usec}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._tell("STATUS=" + " ".join(text.split()))

    def feed(self) -> None:
        """The watchdog hears of us."""
        self._tell("WATCHDOG=1")

    def close(self) -> None:
        """Tell no more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, *lines: str) -> None:
        if self._socket is None or self._address is None:
            return
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
            self._failed = False
        except OSError as error:
            # The daemon goes on without its service manager; said once, until it is heard again.
            if not self._failed:
                _log.warning("service_manager_not_told", reason=str(error))
            self._failed = True
