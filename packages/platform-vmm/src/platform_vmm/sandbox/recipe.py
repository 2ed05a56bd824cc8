"""What a sandbox is made of: bubblewrap's arguments, limits and the guest's environment. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOM = "/mnt"
"""Where stage puts what the guest may see, in its own mount namespace."""
IMAGE = "/opt/platform"
"""Where the guest finds its runtime image."""
GUEST_UID = 1000
"""Never 0: a parent's uid 0 cannot be mapped again, and the SDK nests a sandbox of its own."""
MIB = 1024 * 1024
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One sandbox, wholly decided. Sizes in bytes; `cpus` in cores."""

    command: Sequence[str]
    environment: Mapping[str, str]
    image: Path
    shared: Path
    memory_bytes: int
    disk_bytes: int
    cpus: int
    pids: int
    ports: Sequence[int] = field(default_factory=list)
    """TCP ports of the host's loopback that the guest reaches at 10.0.2.2."""

    @property
    def memory_limit(self) -> int:
        """The control group's limit: a page of tmpfs is memory too."""
        return self.memory_bytes + self.disk_bytes

    def binds(self) -> list[tuple[str, str]]:
        """(host path, name in the room), for stage."""
        return [
            (str(self.image), "image"),
            (str(self.shared), "shared"),
            (f"{self.shared}/dstack.sock", "agent"),
        ]

    def bwrap_arguments(self) -> list[str]:
        """Everything but the command; passed through a memfd, so that no path of the host shows inside."""
        disk = f"{ROOM}/disk"
        arguments = ["--unshare-user", "--uid", str(GUEST_UID), "--gid", str(GUEST_UID)]
        arguments += [
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
            "--unshare-cgroup-try",
            "--hostname",
            "vm",
        ]
        arguments += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv"]
        for name, value in self.environment.items():
            arguments += ["--setenv", name, value]
        arguments += ["--ro-bind", "/usr", "/usr"]
        for name, target in _LINKS.items():
            if os.path.islink(f"/{name}"):
                arguments += ["--symlink", target, f"/{name}"]
            elif os.path.isdir(f"/{name}"):
                arguments += ["--ro-bind", f"/{name}", f"/{name}"]
        arguments += ["--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        for name in ("passwd", "group", "hosts", "nsswitch.conf"):
            arguments += ["--ro-bind-try", f"{ROOM}/image/etc/{name}", f"/etc/{name}"]
        arguments += [
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--bind",
            f"{disk}/shm",
            "/dev/shm",
            "--remount-ro",
            "/dev",
        ]
        arguments += ["--bind", f"{disk}/tmp", "/tmp", "--bind", f"{disk}/data", "/data"]
        arguments += [
            "--bind",
            f"{disk}/home",
            "/root",
            "--dir",
            "/var",
            "--bind",
            f"{disk}/vartmp",
            "/var/tmp",
        ]
        arguments += ["--bind", f"{disk}/run", "/run", "--symlink", "/run", "/var/run"]
        arguments += ["--bind", f"{ROOM}/agent", "/run/dstack.sock"]
        arguments += [
            "--ro-bind",
            f"{ROOM}/image",
            IMAGE,
            "--ro-bind",
            f"{ROOM}/shared",
            "/dstack/.host-shared",
        ]
        return [*arguments, "--remount-ro", "/", "--chdir", "/root"]

    def rlimits(self) -> dict[str, int]:
        """Limits that hold wherever control groups do not."""
        return {"CORE": 0, "NOFILE": 4096, "MSGQUEUE": 0, "NPROC": self.pids, "MEMLOCK": 64 * 1024}
