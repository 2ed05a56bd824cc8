"""What a run may not have changed on the host: looked at before it, and after all of it has ended."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
from examples.demo.leftovers import Machine, look

from platform_vmm.machines import guest_uids

MARK = "hostile-"
_PLACES = (
    *("/", "/boot", "/dev", "/etc", "/home", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp", "/usr/local"),
    *("/var/lib", "/var/log", "/var/spool", "/var/tmp"),
)
_DEPTH = 3
_NOISY = tuple(
    f"/proc/sys/{each}"
    for each in ("fs/", "kernel/random/", "kernel/ns_last_pid", "kernel/pty/nr", "net/netfilter/")
)
_MOST = 4096


@dataclass(frozen=True, slots=True)
class Host:
    """A look at it. `runs`: processes, mounts, groups and namespaces of each run."""

    runs: tuple[Machine, ...]
    sysctls: dict[str, bytes]
    listeners: frozenset[str]
    files: frozenset[str]
    programs: frozenset[tuple[int, float]]


def look_at_host(states: tuple[Path, ...]) -> Host:
    """Look."""
    guests = _guests(states)
    return Host(
        tuple(look(state) for state in states),
        _sysctls(),
        _listeners(),
        frozenset(_odd_files(states, guests)),
        frozenset(_processes_of(guests)),
    )


def changes(before: Host, after: Host) -> list[str]:
    """What is there now and was not, or differs, in words."""
    found = []
    for old, new in zip(before.runs, after.runs, strict=True):
        found += [f"process {pid}" for pid, _ in new.processes - old.processes]
        # Named network namespaces are made by whoever else tests on this machine; no guest can name one.
        found += [f"mount {each}" for each in new.mounts - old.mounts if not each.startswith("/run/netns/")]
        found += [f"control group {group}" for group in new.cgroups - old.cgroups]
        found += [f"namespace {name}" for name in new.namespaces - old.namespaces]
    found += [f"process {pid} of a guest's uid" for pid, _ in after.programs - before.programs]
    found += [
        f"sysctl {name}" for name, text in after.sysctls.items() if before.sysctls.get(name, text) != text
    ]
    found += [f"listener {each}" for each in after.listeners - before.listeners]
    found += [f"file {path}" for path in after.files - before.files]
    return sorted(set(found))


def marked_files(token: str, states: tuple[Path, ...]) -> tuple[str, ...]:
    """Files outside the runs' own folders whose name has this token."""
    return tuple(path for path in _odd_files(states, []) if token in path)


def _guests(states: tuple[Path, ...]) -> list[range]:
    """The uids of the guests of the runs' own VMMs; others may run on this machine."""
    return [guest_uids(state / "vmm") for state in states if (state / "vmm").exists()]


def _odd_files(states: tuple[Path, ...], guests: list[range]) -> list[str]:
    """Files that belong to a guest's uid, or are named as an attack's are, outside the runs' folders.

    Where programs keep files that are not the system's, three folders deep.
    """
    own = {str(state) for state in states}
    found = []
    for top in _PLACES:
        for folder, folders, names in os.walk(top, followlinks=False):
            deep = top == "/" or folder.count("/") - top.count("/") >= _DEPTH
            here = [f"{folder.rstrip('/')}/{name}" for name in (*names, *folders)]
            folders[:] = [] if deep else [each for each in folders if f"{folder}/{each}" not in own]
            for path in here:
                with contextlib.suppress(OSError):
                    uid = os.lstat(path).st_uid
                    if Path(path).name.startswith(MARK) or any(uid in each for each in guests):
                        found.append(path)
    return found


def _sysctls() -> dict[str, bytes]:
    found = {}
    for folder, _, names in os.walk("/proc/sys"):
        for name in names:
            path = f"{folder}/{name}"
            if not path.startswith(_NOISY):
                with contextlib.suppress(OSError), Path(path).open("rb") as file:
                    found[path] = file.read(_MOST)
    return found


def _listeners() -> frozenset[str]:
    """Of this network namespace; a port that somebody is bound to."""
    kinds = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}
    return frozenset(
        f"{kinds.get(each.type, '?')} {each.laddr.ip}:{each.laddr.port}"
        for each in psutil.net_connections("inet")
        if each.laddr and (each.status == psutil.CONN_LISTEN or each.type == socket.SOCK_DGRAM)
    )


def _processes_of(guests: list[range]) -> list[tuple[int, float]]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = any(process.uids().real in each for each in guests)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.pid, process.create_time()))
    return found
