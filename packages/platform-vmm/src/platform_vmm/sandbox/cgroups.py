"""Control groups of a sandbox, as this host has them: version 1, 2, or 1 with an empty 2 for killing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_V1_CONTROLLERS = ("memory", "cpu", "pids", "freezer")
_CPU_PERIOD_US = 100_000


@dataclass(frozen=True, slots=True)
class Limits:
    """`memory_bytes` with swap off where the host can, `cpus` in cores, `pids` with threads."""

    memory_bytes: int
    cpus: int
    pids: int


class ControlGroups:
    """The groups of one VMM, below its own group where it has one; one group a sandbox."""

    def __init__(self, name: str, root: Path = ROOT) -> None:
        self._hierarchies = _hierarchies(name, root)

    @property
    def limits_hold(self) -> bool:
        """Whether memory, CPU and pids are limited by the kernel's groups here."""
        kinds = {kind for kind, _ in self._hierarchies}
        return "v2" in kinds or {"memory", "cpu", "pids"} <= kinds

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
        """SIGKILL the whole tree: at once by cgroup.kill where there is one, else one by one."""
        for _, base in self._hierarchies:
            group = base / sandbox
            with contextlib.suppress(OSError):
                (group / "cgroup.kill").write_text("1")
                continue
            for pid in _processes(group):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def remove(self, sandbox: str, timeout: float = 10.0) -> None:
        """Remove the groups once they are empty, killing what is in the way.

        Raises:
            TimeoutError: Something in there does not die.
        """
        async with asyncio.timeout(timeout):
            while not self._removed(sandbox):
                self.kill(sandbox)
                await asyncio.sleep(0.01)

    def _removed(self, sandbox: str) -> bool:
        for _, base in self._hierarchies:
            try:
                (base / sandbox).rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    def leftovers(self) -> list[str]:
        """Sandboxes whose groups are there: after a crash, what is to be reclaimed."""
        names: set[str] = set()
        for _, base in self._hierarchies:
            if base.is_dir():
                names.update(entry.name for entry in base.iterdir() if entry.is_dir())
        return sorted(names)

    def close(self) -> None:
        """Remove this VMM's own empty groups."""
        for _, base in self._hierarchies:
            with contextlib.suppress(OSError):
                base.rmdir()

    def usage(self, sandbox: str) -> dict[str, int]:
        """`memory_peak_bytes` and `oom_kills` so far, where the host counts them."""
        found: dict[str, int] = {}
        for kind, base in self._hierarchies:
            group = base / sandbox
            peak = {"memory": "memory.max_usage_in_bytes", "v2": "memory.peak"}.get(kind)
            events = {"memory": "memory.oom_control", "v2": "memory.events"}.get(kind)
            with contextlib.suppress(OSError, ValueError):
                if peak:
                    found["memory_peak_bytes"] = int((group / peak).read_text())
            with contextlib.suppress(OSError, ValueError):
                if events:
                    pairs = dict(line.split() for line in (group / events).read_text().splitlines())
                    found["oom_kills"] = int(pairs.get("oom_kill", 0))
        return found


def _hierarchies(name: str, root: Path) -> list[tuple[str, Path]]:
    if (root / "cgroup.controllers").exists():
        with contextlib.suppress(OSError):
            (root / "cgroup.subtree_control").write_text("+memory +cpu +pids")
            base = root / name
            base.mkdir(exist_ok=True)
            (base / "cgroup.subtree_control").write_text("+memory +cpu +pids")
            return [("v2", base)]
        return []
    found = [
        (controller, _own_group(root / controller, controller) / name)
        for controller in _V1_CONTROLLERS
        if os.access(root / controller, os.W_OK)
    ]
    if os.access(root / "unified", os.W_OK):
        found.append(("kill", root / "unified" / name))
    return found


def _own_group(mount: Path, controller: str) -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = mount / path.lstrip("/")
            return own if own.is_dir() else mount
    return mount


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
            ("cpu.max", f"{quota} {_CPU_PERIOD_US}"),
            ("pids.max", str(limits.pids)),
        ]
    return []


def _processes(group: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    return []
