"""The serial log of a VM: the first MiBs are kept, the rest is counted, and the guest never blocks."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

KEPT_BYTES = 4 * 1024 * 1024
_CHUNK = 65536


class Console:
    """Reads a pipe that the guest writes and appends to a file, up to a cap."""

    def __init__(self, path: Path, kept: int = KEPT_BYTES) -> None:
        self._path = path
        self._room = kept - (path.stat().st_size if path.exists() else 0)
        self._read: int | None = None
        self._file: int | None = None
        self.dropped = 0

    def attach(self) -> int:
        """Open file and pipe, begin to read. Returns the write end: the caller closes it."""
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        self._read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(write, True)
        asyncio.get_running_loop().add_reader(self._read, self._readable)
        return write

    def note(self, text: str) -> None:
        """A line of the VMM's own."""
        if self._file is not None:
            os.write(self._file, f"{text}\n".encode())

    async def close(self) -> None:
        """Take what is still in the pipe and stop. Safe to call twice."""
        if self._read is not None:
            self._readable()
        if self._read is not None:
            asyncio.get_running_loop().remove_reader(self._read)
            os.close(self._read)
            self._read = None
        if self._file is not None:
            if self.dropped:
                self.note(f"[vmm: {self.dropped} bytes more were written and not kept]")
            os.close(self._file)
            self._file = None

    def _readable(self) -> None:
        while self._read is not None:
            try:
                chunk = os.read(self._read, _CHUNK)
            except BlockingIOError:
                return
            if not chunk:
                asyncio.get_running_loop().remove_reader(self._read)
                os.close(self._read)
                self._read = None
                return
            kept = chunk[: max(0, self._room)]
            self._room -= len(kept)
            self.dropped += len(chunk) - len(kept)
            if kept and self._file is not None:
                with contextlib.suppress(OSError):
                    os.write(self._file, kept)
            if len(chunk) < _CHUNK:
                return
