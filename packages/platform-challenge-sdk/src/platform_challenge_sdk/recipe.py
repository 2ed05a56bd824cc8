"""What a contained run sees and may do: bubblewrap's arguments, or Landlock's rules, and the limits. Pure."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platform_challenge_sdk import landlock
from platform_challenge_sdk.containment import Containment
from platform_challenge_sdk.means import MIB, PROCESSES, Egress
from platform_challenge_sdk.relay import proxy_environment

OUTPUT_BYTES = 4 * MIB
_UID = 1000
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin"}
_DEVICES = {"null": True, "zero": True, "full": True, "random": False, "urandom": False}
"""What of /dev a run without namespaces may read, and whether it may write there."""
_FACTS = ("/etc/ld.so.cache", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu")
_WORKSPACE, _SUBMISSION, _SCRATCH, _SHARED = "/workspace", "/submission", "/tmp", "/dev/shm"  # noqa: S108 - the run's own
_SAFE_PATH = f"{sys.prefix}/bin:{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class Order:
    """One run. Sizes in bytes, `timeout` in seconds.

    `memory`: of the whole tree; `address_space`: of each process, 0 for as much. `egress`: the proxy that it
    may reach through a relay; None: it has no network.

    Raises:
        ValueError: No command, a NUL in it, a file's name with a folder, files larger than `disk`, or a
            limit that is not positive.
    """

    argv: Sequence[str]
    submission: Path
    stdin: bytes
    timeout: float
    memory: int
    files: Mapping[str, bytes]
    disk: int
    output: int = OUTPUT_BYTES
    address_space: int = 0
    processes: int = PROCESSES
    egress: Egress | None = None

    def __post_init__(self) -> None:
        if not self.argv or any("\0" in word for word in self.argv):
            raise ValueError("argv: expected a command, without NUL")
        for name in self.files:
            if not name or name in {".", ".."} or "/" in name or "\0" in name:
                raise ValueError(f"files: expected a plain file name, got {name!r}")
        if min(self.timeout, self.memory, self.disk, self.output) <= 0:
            raise ValueError("timeout, memory, disk and output: expected more than 0")
        if sum(len(data) for data in self.files.values()) > self.disk:
            raise ValueError(f"files: expected at most disk = {self.disk} bytes")

    def rlimits(self) -> dict[str, int]:
        """For each process; NPROC counts the run's own, since its user namespace is its own."""
        return {
            "AS": self.address_space or self.memory,
            "NPROC": self.processes,
            "CORE": 1,  # neither file nor handler: at 0 a core_pattern with a pipe would still be fed
            "NOFILE": 1024,
            "MSGQUEUE": 0,
            "FSIZE": self.disk,
            "MEMLOCK": 65536,
        }

    def binds(self) -> list[tuple[str, str]]:
        """(path here, name in the stage's room): what the run may read besides /usr."""
        found = [(str(self.submission), "submission")]
        return found + [(prefix, f"python{index}") for index, prefix in enumerate(_prefixes())]

    def arguments(self, room: str, files: Mapping[str, int], seccomp: int) -> list[str]:
        """bubblewrap's, up to the command."""
        words = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
        # With an egress proxy the network namespace is the stage's, where the relay listens.
        words += ["--unshare-net"] if self.egress is None else []
        words += ["--uid", str(_UID), "--gid", str(_UID)]
        words += ["--disable-userns", "--cap-drop", "ALL", "--die-with-parent", "--new-session"]
        words += ["--hostname", "submission", "--clearenv", "--seccomp", str(seccomp)]
        environment = _environment(_WORKSPACE, _SCRATCH)
        environment |= {} if self.egress is None else proxy_environment()
        for name, value in environment.items():
            words += ["--setenv", name, value]
        words += ["--ro-bind", "/usr", "/usr"]
        for name, target in _LINKS.items():
            if Path("/", name).is_symlink():
                words += ["--symlink", target, f"/{name}"]
            elif Path("/", name).is_dir():
                words += ["--ro-bind", f"/{name}", f"/{name}"]
        words += ["--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        for index, prefix in enumerate(_prefixes()):
            words += ["--ro-bind", f"{room}/python{index}", prefix]
        words += ["--proc", "/proc", "--dev", "/dev", "--bind", f"{room}/disk/shm", _SHARED]
        words += ["--dev-bind", f"{room}/pts", "/dev/pts", "--remount-ro", "/dev"]
        words += ["--bind", f"{room}/disk/workspace", _WORKSPACE]
        words += ["--bind", f"{room}/disk/tmp", _SCRATCH, "--ro-bind", f"{room}/submission", _SUBMISSION]
        for name, descriptor in files.items():
            words += ["--file", str(descriptor), f"{_WORKSPACE}/{name}"]
        return [*words, "--remount-ro", "/", "--chdir", _SUBMISSION]

    def confined(
        self, room: Path, submission: Path, containment: Containment, uid: int | None
    ) -> dict[str, Any]:
        """For the stage, where there are no namespaces: `room` has the writable folders.

        In `argv`, words that are or begin with one of the three fixed folders mean the run's own.
        """
        known = containment.landlock
        workspace, scratch = str(room / "workspace"), str(room / "tmp")
        readable = ["/usr", *(f"/{name}" for name in _LINKS), *_FACTS, *_prefixes(), str(submission)]
        paths = [(path, landlock.READ & landlock.file_rights(known)) for path in readable]
        paths += [(folder, landlock.write_rights(known)) for folder in (workspace, scratch)]
        for name, writable in _DEVICES.items():
            paths.append((f"/dev/{name}", landlock.USE if writable else landlock.READ))
        fence = landlock.signal_fence().hex() if known >= landlock.SIGNALS else None
        folders = {_WORKSPACE: workspace, _SCRATCH: scratch, _SUBMISSION: str(submission)}
        return {
            "arguments": [_moved(word, folders) for word in self.argv],
            "confined": {
                "uid": uid,
                "ruleset": landlock.ruleset(known).hex(),
                "fence": fence,
                "paths": paths,
                "folder": str(submission),
                "environment": _environment(workspace, scratch),
            },
        }


def _environment(workspace: str, scratch: str) -> dict[str, str]:
    return {
        "PATH": _SAFE_PATH,
        "HOME": workspace,
        "LANG": "C.UTF-8",
        "TMPDIR": scratch,
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _moved(word: str, folders: Mapping[str, str]) -> str:
    for fixed, folder in folders.items():
        if word == fixed or word.startswith(f"{fixed}/"):
            return folder + word.removeprefix(fixed)
    return word


def _prefixes() -> list[str]:
    outside = {prefix for prefix in (sys.prefix, sys.base_prefix) if Path("/usr") not in Path(prefix).parents}
    return sorted(outside - {os.sep, "/usr"})
