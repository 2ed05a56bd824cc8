"""What a sandbox is made of: bubblewrap's arguments, limits and the guest's environment. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from platform_protocol.filesystem_policy import FilesystemPolicy

ROOM = "/mnt"
"""Where stage puts what the guest may see, in its own mount namespace."""
IMAGE = "/opt/platform"
"""Where the guest finds its runtime image."""
GUEST_UID = 1000
"""Never 0: a parent's uid 0 cannot be mapped again, and the SDK nests a sandbox of its own."""
MIB = 1024 * 1024
FILTER_FD = 4
"""Where bubblewrap finds the system call filter."""
NAMESPACES = {
    "user": 128,
    "mnt": 128,
    "pid": 128,
    "ipc": 128,
    "uts": 128,
    "cgroup": 1,
    "net": 64,
    "time": 8,
}
"""How many namespaces a guest may hold at once: enough for nested sandboxes, not for a flood of them.

Of cgroup namespaces only the one it begins in: in a second one it could mount the control groups, and where
the VMM is an ordinary user their files, limits included, would be its own.
"""
_INODES = 65_536
_INODE_BYTES = 4096
"""A disk has one inode for so many bytes, up to _INODES: a file of its own takes a page of the kernel's."""
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_ETC = ("ld.so.cache", "alternatives")
_IMAGE_ETC = ("passwd", "group", "hosts", "nsswitch.conf")
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin"}
_WRITABLE = {"tmp": "/tmp", "data": "/data", "home": "/root", "vartmp": "/var/tmp", "run": "/run"}
_AGENT = "/run/dstack.sock"


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
    scratch: Sequence[str] = ()
    """More writable places, on the same capped disk."""
    filesystem: FilesystemPolicy = field(default_factory=FilesystemPolicy)
    inodes_most: int = _INODES
    devices: Sequence[str] = ()
    """Character devices of the host that the guest has too, under the same path."""

    @property
    def memory_limit(self) -> int:
        """The control group's limit: a page of tmpfs is memory too."""
        return self.memory_bytes + self.writable_bytes

    @property
    def writable_bytes(self) -> int:
        """The cap over all writable places together: the operator's, and never more than the disk."""
        most = self.filesystem.tmpfs_size_mb
        return self.disk_bytes if most is None else min(self.disk_bytes, most * MIB)

    @property
    def inodes(self) -> int:
        """The cap on files over all writable places together."""
        return min(self.inodes_most, self.writable_bytes // _INODE_BYTES)

    def binds(self) -> list[tuple[str, str]]:
        """(host path, name in the room), for stage."""
        return [
            (str(self.image), "image"),
            (str(self.shared), "shared"),
            (f"{self.shared}/dstack.sock", "agent"),
        ]

    def places(self) -> dict[str, str]:
        """Folder of the disk to place in the guest."""
        found = {"shm": "/dev/shm", **_WRITABLE}
        for number, place in enumerate((*self.scratch, *self.filesystem.allowed_paths)):
            if not any(place == other or place.startswith(f"{other}/") for other in found.values()):
                found[f"scratch{number}"] = place
        return found

    def writable_root(self) -> dict[str, str]:
        """What of the system becomes writable, each a folder that stage finds, with its name in the room."""
        if self.filesystem.read_only:
            return {}
        folders = [path for path in _SYSTEM if os.path.isdir(path) and not os.path.islink(path)]
        return {path: path.strip("/") for path in folders} | {f"{ROOM}/image": "image"}

    def copies(self) -> dict[str, str]:
        """Files and folders that a writable /etc begins with: source to place."""
        if self.filesystem.read_only:
            return {}
        here = {f"/etc/{name}": f"/etc/{name}" for name in _ETC}
        return here | {f"{ROOM}/image/etc/{name}": f"/etc/{name}" for name in _IMAGE_ETC}

    def bwrap_arguments(self) -> list[str]:
        """What comes before the covers; passed through a memfd, so that no path of the host shows inside."""
        image = f"{ROOM}/image" if self.filesystem.read_only else f"{ROOM}/system/image"
        words = ["--unshare-user", "--uid", str(GUEST_UID), "--gid", str(GUEST_UID), "--unshare-pid"]
        words += ["--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "vm"]
        words += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv"]
        for name, value in self.environment.items():
            words += ["--setenv", name, value]
        words += self._system()
        words += ["--proc", "/proc", "--dev", "/dev"]
        for folder, place in self.places().items():
            words += ["--bind", f"{ROOM}/disk/{folder}", place]
        for device in self.devices:
            words += ["--dev-bind", f"{ROOM}/devices/{os.path.basename(device)}", device]
        words += ["--remount-ro", "/dev", "--symlink", "/run", "/var/run"]
        words += ["--bind", f"{ROOM}/agent", _AGENT, "--symlink", "../dstack.sock", "/run/dstack/dstack.sock"]
        words += ["--ro-bind" if self.filesystem.read_only else "--bind", image, IMAGE]
        words += ["--ro-bind", f"{ROOM}/shared", "/dstack/.host-shared"]
        words += ["--symlink", ".host-shared/app-compose.json", "/dstack/app-compose.json"]
        words += ["--symlink", ".host-shared/.user-config", "/dstack/user_config"]
        return words

    def closing_arguments(self, *, filtered: bool) -> list[str]:
        """What comes after them, up to the command."""
        words = ["--remount-ro", "/"] if self.filesystem.read_only else []
        words += ["--chdir", "/root"]
        return [*words, "--seccomp", str(FILTER_FD)] if filtered else words

    def rlimits(self) -> dict[str, int]:
        """Limits that hold wherever control groups do not."""
        return {
            "CORE": 1,  # neither file nor handler: at 0 a core_pattern with a pipe would still be fed
            "NOFILE": 4096,
            "MSGQUEUE": 0,
            "NPROC": self.pids,
            "MEMLOCK": 64 * 1024,
            "SIGPENDING": 4096,
            "RTPRIO": 0,
            "NICE": 0,
        }

    def _system(self) -> list[str]:
        if not self.filesystem.read_only:
            return self._writable_system()
        words = ["--ro-bind", "/usr", "/usr"]
        for name, target in _LINKS.items():
            if os.path.islink(f"/{name}"):
                words += ["--symlink", target, f"/{name}"]
            elif os.path.isdir(f"/{name}"):
                words += ["--ro-bind", f"/{name}", f"/{name}"]
        words += ["--dir", "/etc"]
        for name in _ETC:
            words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        for name in _IMAGE_ETC:
            words += ["--ro-bind-try", f"{ROOM}/image/etc/{name}", f"/etc/{name}"]
        return words

    def _writable_system(self) -> list[str]:
        """The root on the guest's disk, the system's folders in layers above the host's."""
        words = ["--bind", f"{ROOM}/disk/rootfs", "/"]
        for path, name in self.writable_root().items():
            if path in _SYSTEM:
                words += ["--bind", f"{ROOM}/system/{name}", path]
        for name, target in _LINKS.items():
            if os.path.islink(f"/{name}"):
                words += ["--symlink", target, f"/{name}"]
        return words
