"""What a run may leave: processes, mounts, control groups, namespaces; only this run's own are counted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Machine:
    """A look at the machine."""

    processes: frozenset[tuple[int, float]]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    namespaces: frozenset[str]


def look(state: Path) -> Machine:
    """Processes in this run's groups or named for its state, their namespaces, its groups; all mounts."""
    names = [f"platform-vmm-{known.read_text().strip()}" for known in sorted(state.glob("vmm*/id"))]
    processes: set[tuple[int, float]] = set()
    namespaces: set[str] = set()
    for process in psutil.process_iter():
        try:
            with process.oneshot():
                groups = Path(f"/proc/{process.pid}/cgroup").read_text()
                ours = any(name in groups for name in names) or str(state) in " ".join(process.cmdline())
                if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    processes.add((process.pid, process.create_time()))
                    namespaces.add(str(Path(f"/proc/{process.pid}/ns/net").readlink()))
        except (psutil.Error, OSError):
            continue
    mounts = frozenset(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    left_groups = [group for name in names for group in Path("/sys/fs/cgroup").glob(f"**/{name}")]
    return Machine(frozenset(processes), mounts, frozenset(map(str, left_groups)), frozenset(namespaces))


def left(before: Machine, after: Machine) -> dict[str, list[str]]:
    """What is there now and was not before, by kind; kinds with nothing left are absent."""
    rows = {
        "processes": [str(pid) for pid, _ in sorted(after.processes - before.processes)],
        "mounts": sorted(after.mounts - before.mounts),
        "cgroups": sorted(after.cgroups - before.cgroups),
        "namespaces": sorted(after.namespaces - before.namespaces),
    }
    return {kind: found for kind, found in rows.items() if found}
