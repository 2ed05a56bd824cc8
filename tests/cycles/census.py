"""What a VMM holds of its machine at one moment, counted from outside of it, kind by kind.

Only what is the VMM's counts, so that others may use the machine meanwhile: every process below the counter
is the VMM's, for a subreaper inherits what is orphaned.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

KINDS = ("processes", "mounts", "namespaces", "cgroups", "files", "ports", "descriptors")
_PR_SET_CHILD_SUBREAPER, _CLONE_NEWNS, _REC_PRIVATE = 36, 0x20000, 0x4000 | 1 << 18
_LISTENING = "0A"
_SHARED = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
_SPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_PAGE = os.sysconf("SC_PAGESIZE")

Census = Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a VMM may leave something: its folders, the name of its groups, and its guests' uids."""

    state: Path
    temporary: Path
    groups: str
    uids: range


def become_the_counter() -> None:
    """Inherit all orphans; as root, see no mounts but our children's."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    private = ctypes.c_ulong(_REC_PRIVATE)
    if os.getuid() == 0 and (libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, private, None)):
        raise OSError(ctypes.get_errno(), "a mount namespace for the run")


def take(vmm: int | None, place: Place) -> Census:
    """Count. `vmm` is its pid, which does not count itself; None: it has ended, and nothing may be there."""
    ours = _descendants(os.getpid())
    if vmm is not None:
        ours.pop(vmm, None)
    _reap(pid for pid, (parent, state) in ours.items() if parent == os.getpid() and state == "Z")
    ours = {pid: found for pid, found in ours.items() if _alive(pid)}
    everyone = [*ours, *([] if vmm is None else [vmm])]
    open_files = {pid: _open_files(pid) for pid in everyone}
    table = _lines(f"/proc/{os.getpid() if vmm is None else vmm}/mountinfo")
    mounts = [line for line in table if os.getuid() == 0 or str(place.state) in line]
    spaces = {_link(f"/proc/{pid}/ns/{kind}") for pid in ours for kind in _SPACES}
    spaces |= {held for held in _all(open_files) if held.split(":[")[0] in _SPACES}
    spaces |= {line.split()[3] for line in mounts if " - nsfs " in line}
    listening = _listening() & {
        held.removeprefix("socket:[").rstrip("]") for held in _all(open_files) if held.startswith("socket:[")
    }
    return {
        "processes": frozenset(f"{pid} {_name(pid)}" for pid in ours),
        "mounts": frozenset(line.split(maxsplit=2)[2] for line in mounts),
        "namespaces": frozenset(spaces - {_link(f"/proc/self/ns/{kind}") for kind in _SPACES} - {""}),
        "cgroups": frozenset(_groups(place.groups)),
        "files": frozenset(_files(place)),
        "ports": frozenset(listening),
        "descriptors": frozenset()
        if vmm is None
        else frozenset(f"{number} {held}" for number, held in open_files[vmm].items()),
    }


def more(now: Census, before: Census) -> dict[str, int]:
    """By kind: how many more there are than before. What was replaced is not more."""
    return {kind: max(0, len(now[kind]) - len(before[kind])) for kind in KINDS}


def resident(vmm: int) -> int:
    """Bytes of memory that a process has to itself."""
    fields = Path(f"/proc/{vmm}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * _PAGE


def _descendants(top: int) -> dict[int, tuple[int, str]]:
    """Process to (parent, state), of all that is below."""
    every: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                every[int(entry.name)] = (int(words[1]), words[0])
    below = {top}
    while new := {pid for pid, (parent, _) in every.items() if parent in below} - below:
        below |= new
    return {pid: every[pid] for pid in below - {top}}


def _reap(pids: Iterable[int]) -> None:
    """As init would: what a killed VMM left behind comes to us."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    return ""


def _open_files(pid: int) -> dict[str, str]:
    """Descriptor to what it leads to."""
    with contextlib.suppress(OSError):
        return {entry.name: _link(str(entry)) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return {}


def _all(open_files: Mapping[int, Mapping[str, str]]) -> set[str]:
    return {held for files in open_files.values() for held in files.values()}


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _listening() -> set[str]:
    rows = [line.split() for name in ("tcp", "tcp6") for line in _lines(f"/proc/net/{name}")[1:]]
    return {row[9] for row in rows if row[3] == _LISTENING}


def _groups(name: str) -> list[str]:
    """Groups of single VMs; the VMM's own stand as long as it does."""
    return [
        str(Path(folder, each))
        for folder, folders, _ in os.walk("/sys/fs/cgroup")
        for each in folders
        if Path(folder).name == name
    ]


def _files(place: Place) -> list[str]:
    """All in the VMM's folders but its images; elsewhere what belongs to a guest's uid."""
    found = []
    for top in (place.state, place.temporary):
        for folder, folders, files in os.walk(top):
            folders[:] = [each for each in folders if not (folder == str(top) and each == "images")]
            found += [str(Path(folder, each)) for each in [*folders, *files]]
    if os.getuid() == 0:
        for shared in _SHARED:
            with contextlib.suppress(OSError), os.scandir(shared) as entries:
                found += [each.path for each in entries if _owner(each) in place.uids]
    return found


def _owner(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_uid
    except OSError:
        return -1
