"""Moves a contained run's stdin, stdout and stderr, and reads the stage's report."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import IO

_CHUNK = 65536
_TICK = 0.05


class Pump:
    """Feeds stdin and reads both outputs until the stage has reported and they are closed.

    At most `limit` bytes of both outputs together are kept; one more ends the run, and what still comes is
    read and dropped, so that nothing ever waits for us. `overdue`: not over at `deadline` (monotonic).
    `orphaned`: the stage ended without a report; what it left may hold the outputs open.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        control: socket.socket,
        *,
        stdin: bytes,
        limit: int,
        deadline: float,
        cancelled: Sequence[threading.Event],
    ) -> None:
        self._control = control
        self._stdin = memoryview(stdin)
        self._room = limit
        self._deadline = deadline
        self._cancelled = cancelled
        self._selector = selectors.DefaultSelector()
        self.stdout, self.stderr, self.report = bytearray(), bytearray(), bytearray()
        self.flooded = self.overdue = self.orphaned = False
        for stream, sink in ((process.stdout, self.stdout), (process.stderr, self.stderr)):
            self._register(stream, selectors.EVENT_READ, sink)
        self._register(process.stdin, selectors.EVENT_WRITE, None)
        control.setblocking(False)
        self._selector.register(control, selectors.EVENT_READ, self.report)

    def run(self) -> None:
        """Until the end."""
        told = False
        while not self.orphaned and any(key.data is not None for key in self._selector.get_map().values()):
            if time.monotonic() >= self._deadline:
                self.overdue = True
                return
            if not told and (self.flooded or any(event.is_set() for event in self._cancelled)):
                told = True
                with contextlib.suppress(OSError):
                    self._control.send(b"end")
            for key, _ in self._selector.select(_TICK):
                if key.data is None:
                    self._feed(key)
                else:
                    self._take(key)

    def close(self) -> None:
        """Close our ends of everything."""
        for key in list(self._selector.get_map().values()):
            self._shut(key)
        self._selector.close()
        self._control.close()

    def _register(self, stream: IO[bytes] | None, events: int, sink: bytearray | None) -> None:
        if stream is not None:
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, events, sink)

    def _take(self, key: selectors.SelectorKey) -> None:
        try:
            chunk = os.read(key.fd, _CHUNK)
        except BlockingIOError:
            return
        except ConnectionError:
            chunk = b""
        if not chunk:
            self.orphaned = self.orphaned or (key.data is self.report and not self.report)
            self._shut(key)
        elif key.data is self.report:
            self.report += chunk
        else:
            key.data.extend(chunk[: self._room])
            self.flooded = self.flooded or len(chunk) > self._room
            self._room -= min(len(chunk), self._room)

    def _feed(self, key: selectors.SelectorKey) -> None:
        try:
            self._stdin = self._stdin[os.write(key.fd, self._stdin[:_CHUNK]) :]
        except BrokenPipeError:
            self._stdin = memoryview(b"")
        except BlockingIOError:
            return
        if not self._stdin:
            self._shut(key)

    def _shut(self, key: selectors.SelectorKey) -> None:
        self._selector.unregister(key.fileobj)
        if not isinstance(key.fileobj, int) and key.data is not self.report:
            with contextlib.suppress(OSError):
                key.fileobj.close()  # type: ignore[attr-defined]  # a pipe: HasFileno does not say that it closes
