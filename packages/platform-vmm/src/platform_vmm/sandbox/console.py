"""The serial log of a VM: the first MiB of each boot is kept, the rest counted, the guest never blocked."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

KEPT_BYTES = 1024 * 1024
KEPT_BOOTS = 4
_CHUNK = 65536
_PIPE = 1024 * 1024
_PAUSE = 0.02


class Console:
    """Reads a pipe that the guest writes, into a file of its own for each boot, up to a cap.

    Beyond the cap it still empties the pipe, at some 50 MB/s: a flood costs the guest, not the VMM.
    """

    def __init__(self, path: Path, kept: int = KEPT_BYTES) -> None:
        self._path = path
        self._room = kept
        self._read: int | None = None
        self._file: int | None = None
        self._pause: asyncio.TimerHandle | None = None
        self.dropped = 0

    def attach(self, name: str) -> int:
        """Open file and pipe, begin to read. Returns the write end: the caller closes it."""
        rotate(self._path)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        self.note(f"===== boot @ {datetime.now(UTC).isoformat(timespec='seconds')} ===== {name}")
        self._read, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._read, fcntl.F_SETPIPE_SZ, _PIPE)
        self._listen()
        return write

    def note(self, text: str) -> None:
        """A line of the VMM's own."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.write(self._file, f"{text}\n".encode())

    async def close(self) -> None:
        """Take what is still in the pipe and stop. Safe to call twice."""
        if self._pause is not None:
            self._pause.cancel()
        if self._read is not None:
            for _ in range(_PIPE // _CHUNK):
                if not self._take(_CHUNK):
                    break
            self._hang_up()
        if self._file is not None:
            if self.dropped:
                self.note(f"[vmm: {self.dropped} bytes more were written and not kept]")
            os.close(self._file)
            self._file = None

    def _listen(self) -> None:
        self._pause = None
        if self._read is not None:
            asyncio.get_running_loop().add_reader(self._read, self._readable)

    def _readable(self) -> None:
        """One chunk at a time, so that no guest keeps the event loop to itself."""
        if not self._take(_CHUNK if self._room > 0 else _PIPE):
            self._hang_up()
        elif self._room <= 0 and self._read is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._read)
            self._pause = loop.call_later(_PAUSE, self._listen)

    def _take(self, size: int) -> bool:
        """Whether there may be more later."""
        if self._read is None:
            return False
        try:
            chunk = os.read(self._read, size)
        except BlockingIOError:
            return True
        kept = chunk[: max(0, self._room)]
        self._room -= len(kept)
        self.dropped += len(chunk) - len(kept)
        if kept and self._file is not None:
            with contextlib.suppress(OSError):
                os.write(self._file, kept)
        return bool(chunk)

    def _hang_up(self) -> None:
        if self._read is not None:
            asyncio.get_running_loop().remove_reader(self._read)
            os.close(self._read)
            self._read = None


def rotate(path: Path) -> None:
    """Make room for another boot: `serial.log` becomes `serial.log.1` and so on; the oldest goes."""
    for number in range(KEPT_BOOTS - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        newer = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
        if newer.exists():
            newer.rename(older)


def boots(path: Path) -> list[Path]:
    """The files that are there, oldest boot first."""
    older = [path.with_name(f"{path.name}.{number}") for number in range(KEPT_BOOTS - 1, 0, -1)]
    return [one for one in (*older, path) if one.exists()]
