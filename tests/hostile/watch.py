"""What the host sees of VMs while they run: control groups, processes and consoles, never their word."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile.attack import Guest

_EVERY = 0.03
_NEW_EACH_TIME = 40
_FILES = 50
_PROGRAM = b"main.py"
_GROUPS = Path("/sys/fs/cgroup")
_PLACES = ("workspace", "tmp")


@dataclass(slots=True)
class Watch:
    """Samples every VM of one VMM. `vmm` is its state directory; `guests` by the VMM's id of a VM.

    A submission's process is told by its command line, which it can change and bubblewrap's cannot: the
    watch is there to see what a contained run still does, not to find who hides.
    """

    vmm: Path
    guests: dict[str, Guest] = field(default_factory=dict)
    _seen: dict[int, float] = field(default_factory=dict)
    _others: set[int] = field(default_factory=set)
    _thread: threading.Thread | None = None
    _end: bool = False

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._end = True
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        base: dict[str, Path] = {}
        while not self._end:
            base = base or self._bases()
            for group in _folders(base.get("pids")):
                self._look(group, base)
            time.sleep(_EVERY)

    def _bases(self) -> dict[str, Path]:
        try:
            name = f"platform-vmm-{(self.vmm / 'id').read_text().strip()}"
        except OSError:
            return {}
        found = {
            kind: next((_GROUPS / kind).glob(f"**/{name}"), None) or Path("/nonexistent")
            for kind in ("pids", "memory")
        }
        return found if found["pids"].exists() else {}

    def _look(self, group: Path, base: dict[str, Path]) -> None:
        guest = self.guests.setdefault(group.name, Guest())
        with contextlib.suppress(OSError, ValueError):
            guest.processes = max(guest.processes, int((group / "pids.current").read_text()))
        with contextlib.suppress(OSError, ValueError):
            peak = base["memory"] / group.name / "memory.max_usage_in_bytes"
            guest.memory = max(guest.memory, int(peak.read_text()))
        with contextlib.suppress(OSError):
            log = self.vmm / "vms" / group.name / "serial.log"
            guest.console = max(guest.console, log.stat().st_size)
        with contextlib.suppress(OSError, ValueError):
            pids = [int(line) for line in (group / "cgroup.procs").read_text().split()]
            self._processes(guest, pids)

    def _processes(self, guest: Guest, pids: list[int]) -> None:
        fresh = [pid for pid in pids if pid not in self._seen and pid not in self._others]
        for pid in fresh[:_NEW_EACH_TIME]:
            words = _read(f"/proc/{pid}/cmdline")
            if words:
                self._others.add(pid)
            if _PROGRAM in words and b"bwrap" not in words.split(b"\0")[0]:
                self._seen[pid] = time.monotonic()
        now = time.monotonic()
        programs = [pid for pid in pids if pid in self._seen]
        for pid in programs:
            guest.submission_s = max(guest.submission_s, now - self._seen[pid])
        for pid in programs[:1]:
            self._inside(guest, pid)

    def _inside(self, guest: Guest, pid: int) -> None:
        """The disk and the raw sockets of the run that a process is in."""
        for kind in ("raw", "packet"):
            lines = _read(f"/proc/{pid}/net/{kind}").splitlines()
            guest.raw_sockets = max(guest.raw_sockets, len(lines) - 1)
        for place in _PLACES:
            folder = f"/proc/{pid}/root/{place}"
            with contextlib.suppress(OSError):
                disk = os.statvfs(folder)
                guest.inodes = max(guest.inodes, disk.f_files - disk.f_ffree)
                with os.scandir(folder) as entries:
                    for entry, _ in zip(entries, range(_FILES), strict=False):
                        size = entry.stat(follow_symlinks=False).st_size
                        guest.largest_file = max(guest.largest_file, size)


def _folders(base: Path | None) -> list[Path]:
    try:
        return [] if base is None else [entry for entry in base.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
