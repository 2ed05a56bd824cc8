"""Control groups of a sandbox, in whatever hierarchies this host has: version 1, 2, or both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from platform_vmm.sandbox.hierarchies import OWN, ROOT, find_hierarchies
from platform_vmm.state import write_durably

_CPU_PERIOD_US = 100_000
_RETRY = 0.01


@dataclass(frozen=True, slots=True)
class Limits:
    """`memory_bytes` with swap off where the host can, `cpus` in cores, `pids` with threads."""

    memory_bytes: int
    cpus: int
    pids: int


def _number(name: str, unit: int = 1) -> Callable[[Path], int]:
    """Reads a file that is one number."""
    return lambda group: int((group / name).read_text()) // unit


def _entry(name: str, key: str, unit: int = 1) -> Callable[[Path], int]:
    """Reads one of a file's lines `key number`."""

    def read(group: Path) -> int:
        return int(dict(line.split() for line in (group / name).read_text().splitlines())[key]) // unit

    return read


_COUNTERS = {
    "memory": {
        "memory_bytes": _number("memory.usage_in_bytes"),
        "memory_peak_bytes": _number("memory.max_usage_in_bytes"),
        "oom_kills": _entry("memory.oom_control", "oom_kill"),
    },
    "cpuacct": {"cpu_time_ms": _number("cpuacct.usage", 1_000_000)},
    "v2": {
        "memory_bytes": _number("memory.current"),
        "memory_peak_bytes": _number("memory.peak"),
        "oom_kills": _entry("memory.events", "oom_kill"),
        "cpu_time_ms": _entry("cpu.stat", "usage_usec", 1000),
    },
}


class ControlGroups:
    """The groups of one VMM, below its own group where it has one; one group a sandbox.

    `ledger` is the file that remembers where groups were made, for the VMM's next start.
    """

    def __init__(self, name: str, *, ledger: Path | None = None, root: Path = ROOT, own: Path = OWN) -> None:
        self._found = find_hierarchies(name, root, own)
        self._hierarchies = self._found.bases
        self._ledger = ledger
        known = [base for _, base in self._hierarchies]
        self._earlier = [base for base in _read(ledger) if base not in known]
        self._write_ledger()

    @property
    def limits_hold(self) -> bool:
        """Whether memory, CPU and pids are limited by the kernel's groups here."""
        return self._found.limited >= {"memory", "cpu", "pids"}

    def create(self, sandbox: str, limits: Limits) -> None:
        """Make a sandbox's groups with its limits.

        Raises:
            OSError: The kernel refused.
        """
        for kind, base in self._hierarchies:
            group = base / sandbox
            group.mkdir(parents=True, exist_ok=True)
            for name, value in _settings(kind, limits):
                with contextlib.suppress(FileNotFoundError):
                    (group / name).write_text(value)

    def attach(self, sandbox: str, pid: int) -> None:
        """Put a process, and all that it will fork, under the limits.

        Raises:
            OSError: The kernel refused.
        """
        for _, base in self._hierarchies:
            (base / sandbox / "cgroup.procs").write_text(str(pid))

    def kill(self, sandbox: str) -> None:
        """SIGKILL the whole tree: at once by cgroup.kill where there is one, else frozen first."""
        _kill([base / sandbox for _, base in self._hierarchies])

    async def remove(self, sandbox: str, timeout: float = 10.0) -> None:
        """Remove the groups once they are empty, killing what is in the way.

        Raises:
            TimeoutError: Something in there does not die.
        """
        async with asyncio.timeout(timeout):
            await _until_removed([base / sandbox for _, base in self._hierarchies])

    def leftovers(self) -> list[str]:
        """Sandboxes whose groups are there."""
        bases = [*self._earlier, *(base for _, base in self._hierarchies)]
        found = {entry.name for base in bases if base.is_dir() for entry in base.iterdir() if entry.is_dir()}
        return sorted(found)

    async def reclaim(self, timeout: float = 10.0) -> list[str]:
        """Kill and remove all that an earlier VMM of this name left, wherever its groups were.

        Returns:
            The sandboxes that were found.

        Raises:
            TimeoutError: Something in there does not die.
        """
        bases = [*self._earlier, *(base for _, base in self._hierarchies)]
        found = self.leftovers()
        async with asyncio.timeout(timeout):
            await _until_removed([base / name for base in bases for name in found])
        for base in self._earlier:
            with contextlib.suppress(OSError):
                base.rmdir()
        self._earlier = []
        self._write_ledger()
        return found

    def close(self) -> None:
        """Remove this VMM's own empty groups."""
        for _, base in self._hierarchies:
            with contextlib.suppress(OSError):
                base.rmdir()
        self._found.leave()

    def _write_ledger(self) -> None:
        """Before any group is made: a VMM started from another group must still find them."""
        bases = [*self._earlier, *(base for _, base in self._hierarchies)]
        if self._ledger is not None:
            write_durably(self._ledger, json.dumps([str(base) for base in bases]))

    def usage(self, sandbox: str) -> dict[str, int]:
        """`memory_bytes` now; `memory_peak_bytes`, `cpu_time_ms` and `oom_kills` so far.

        What the host does not count is left out.
        """
        found: dict[str, int] = {}
        for kind, base in self._hierarchies:
            for name, count in _COUNTERS.get(kind, {}).items():
                with contextlib.suppress(OSError, ValueError, KeyError):
                    found[name] = count(base / sandbox)
        return found


def _settings(kind: str, limits: Limits) -> list[tuple[str, str]]:
    quota = str(limits.cpus * _CPU_PERIOD_US)
    if kind == "memory":
        memory = str(limits.memory_bytes)
        return [("memory.limit_in_bytes", memory), ("memory.memsw.limit_in_bytes", memory)]
    if kind == "cpu":
        return [("cpu.cfs_period_us", str(_CPU_PERIOD_US)), ("cpu.cfs_quota_us", quota)]
    if kind == "pids":
        return [("pids.max", str(limits.pids))]
    if kind == "v2":
        return [
            ("memory.max", str(limits.memory_bytes)),
            ("memory.swap.max", "0"),
            # One process, as version 1 does it: the kernel takes the submission's, not the SDK with it.
            ("memory.oom.group", "0"),
            ("cpu.max", f"{quota} {_CPU_PERIOD_US}"),
            ("pids.max", str(limits.pids)),
        ]
    return []


def _read(ledger: Path | None) -> list[Path]:
    try:
        return [] if ledger is None else [Path(base) for base in json.loads(ledger.read_text())]
    except (OSError, ValueError, TypeError):
        return []


async def _until_removed(groups: list[Path]) -> None:
    while groups := [group for group in groups if not _removed(group)]:
        _kill(groups)
        await asyncio.sleep(_RETRY)


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _kill(groups: list[Path]) -> None:
    """By cgroup.kill where a group has it; else frozen, each process killed, thawed, so that none escapes."""
    for group in groups:
        with contextlib.suppress(OSError):
            (group / "cgroup.kill").write_text("1")
            continue
        freezer = group / "freezer.state"
        with contextlib.suppress(OSError):
            freezer.write_text("FROZEN")
        for pid in _processes(group):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            freezer.write_text("THAWED")


def _processes(group: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split() if pid != "0"]
    return []
