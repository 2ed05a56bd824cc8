"""The submission's own system call filter: an allow list of what ordinary programs need.

A classic BPF program, as `seccomp(2)` takes it: bubblewrap loads it, or the stage where there is none.
What is not on the list does not exist (ENOSYS), so that libraries fall back; what depends on its arguments,
or is refused because a namespace is missing, says so (EPERM, EACCES).
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

from platform_challenge_sdk.syscalls import numbers

_LOAD, _MASK, _RETURN = 0x20, 0x54, 0x06
_EQUAL, _ABOVE, _AT_LEAST, _ANY_BIT = 0x15, 0x25, 0x35, 0x45
_NUMBER, _ARCH = 0, 4
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The machines whose numbers are known, and Linux's name for their calling convention."""
_X32 = 0x40000000
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NEW_NAMESPACES = 0x7E020000
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _SEQPACKET, _TYPE_BITS = 1, 5, 0xF
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_F_SETLEASE = 1024
_RLIMIT_CORE = 4
_DONE = _ERRNO
"""The call is not made, and answers 0."""

_SOCKETS = ("socket", "connect", "bind", "listen", "accept", "accept4")
_OF_OTHERS = ("setpriority", "ioprio_set")
_OF_A_PROCESS = ("sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler")
_OF_A_FILE = (
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "fchownat", "lchown", "utime", "utimes",
    "futimesat", "utimensat",
)  # fmt: skip
_ATTRIBUTES = (
    "setxattr", "lsetxattr", "fsetxattr", "setxattrat", "removexattr", "lremovexattr", "fremovexattr",
    "removexattrat",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Walls:
    """What else stands around a submission; each that is missing closes more calls.

    `network`: a network namespace of its own; without it there are no sockets but connected pairs.
    `mounts`: a mount namespace; without it, no extended attributes (they go on files that anyone may write)
    and no watching of files that it may not read. `identity`: a pid namespace or a uid of its own; without
    it nothing that changes other processes' limits or priorities, and no change of files' modes, owners and
    times, which Landlock does not keep in.
    `truncation`: the file system's walls know truncate(2) (Landlock from version 3).
    """

    network: bool = True
    mounts: bool = True
    identity: bool = True
    truncation: bool = True


def submission_filter(walls: Walls | None = None, machine: str | None = None) -> bytes:
    """The filter, an array of `struct sock_filter`.

    Another architecture's and x32's calls kill the process. clone3 is not on the list, since its flags
    cannot be read here: glibc then uses clone. Sockets are Unix, IPv4, IPv6 and route netlink; there is no
    vsock, which no network namespace would keep in.

    Raises:
        ValueError: A machine whose numbers are not known.
    """
    walls, machine = walls or Walls(), machine or platform.machine()
    if machine not in AUDIT:
        raise ValueError(f"expected one of {', '.join(AUDIT)} for the system call filter, got {machine}")
    known = numbers(machine)
    refused = _refused(walls)
    checked = {name: block for name, block in _checked(walls).items() if name not in refused}
    program = [_load(_ARCH), _jump(_EQUAL, AUDIT[machine], yes=1), _give(_KILL), _load(_NUMBER)]
    program += _when(_AT_LEAST, _X32, _KILL)
    for name, block in checked.items():
        program += [_jump(_EQUAL, known[name], no=len(block)), *block]
    for name, number in refused.items():
        if name in known:
            program += _when(_EQUAL, known[name], _ERRNO | number)
    free = sorted(number for name, number in known.items() if name not in checked and name not in refused)
    for first, last in _ranges(free):
        # In ascending order: what is below a range lies in the gap before it.
        program += [_jump(_AT_LEAST, first, yes=1), _give(_ERRNO | errno.ENOSYS)]
        program += [_jump(_ABOVE, last, yes=1), _give(_ALLOW)]
    return b"".join([*program, _give(_ERRNO | errno.ENOSYS)])


def _refused(walls: Walls) -> dict[str, int]:
    refused: dict[str, int] = {}
    if not walls.network:
        refused |= dict.fromkeys(_SOCKETS, errno.EACCES)
    if not walls.mounts:
        refused |= dict.fromkeys(("inotify_add_watch", *_ATTRIBUTES), errno.EACCES)
    if not walls.truncation:
        refused["truncate"] = errno.EACCES
    if not walls.identity:
        refused |= dict.fromkeys((*_OF_OTHERS, *_OF_A_FILE), errno.EPERM)
    return refused


def _checked(walls: Walls) -> dict[str, list[bytes]]:
    """Blocks that look at a call's arguments and always end in a verdict."""
    no_family = _give(_ERRNO | errno.EAFNOSUPPORT)
    socket = [_load(_argument(0))]
    for family in (_UNIX, _INET, _INET6):
        socket += _when(_EQUAL, family, _ALLOW)
    socket += [_jump(_EQUAL, _NETLINK, yes=1), no_family, _load(_argument(2))]
    socket += [*_when(_EQUAL, 0, _ALLOW), no_family]
    ioctl, fcntl = [_load(_argument(1))], [_load(_argument(1))]
    for request in (_TIOCSTI, _TIOCLINUX):
        ioctl += _when(_EQUAL, request, _ERRNO | errno.EPERM)
    # A lease on a file that is shared keeps others from opening it.
    fcntl += _when(_EQUAL, _F_SETLEASE, _ERRNO | errno.EPERM)
    new_namespaces = _when(_ANY_BIT, _NEW_NAMESPACES, _ERRNO | errno.EPERM)
    checked = {
        "clone": [_load(_argument(0)), *new_namespaces, _give(_ALLOW)],
        "socket": socket,
        "ioctl": [*ioctl, _give(_ALLOW)],
        "fcntl": [*fcntl, _give(_ALLOW)],
        "setrlimit": [_load(_argument(0)), *_when(_EQUAL, _RLIMIT_CORE, _DONE), _give(_ALLOW)],
        "prlimit64": [*([] if walls.identity else _own_process()), *_no_core_limit()],
        "socketpair": [_load(_argument(0)), _jump(_EQUAL, _UNIX, yes=1), no_family, *_pairs(walls)],
    }
    if not walls.identity:
        checked |= {name: [*_own_process(), _give(_ALLOW)] for name in _OF_A_PROCESS}
    return checked


def _pairs(walls: Walls) -> list[bytes]:
    """Unix alone: of another family the kernel makes two sockets, or loads its module, before it says no."""
    if walls.network:
        return [_give(_ALLOW)]
    # Pairs of datagram sockets could still send to a name; these two kinds only to each other.
    kinds = [_load(_argument(1)), struct.pack("=HBBI", _MASK, 0, 0, _TYPE_BITS)]
    kinds += [*_when(_EQUAL, _STREAM, _ALLOW), *_when(_EQUAL, _SEQPACKET, _ALLOW)]
    return [*kinds, _give(_ERRNO | errno.EACCES)]


def _own_process() -> list[bytes]:
    """Goes on when the first argument, a pid, means the caller itself."""
    return [_load(_argument(0)), _jump(_EQUAL, 0, yes=1), _give(_ERRNO | errno.EPERM)]


def _no_core_limit() -> list[bytes]:
    """Asking for RLIMIT_CORE is allowed, setting it does nothing: it stays 1.

    At 0 a crash would still feed a core_pattern that is a pipe: a program with the machine's rights.
    """
    low = _argument(2)
    ask = [_load(low), _jump(_EQUAL, 0, yes=1), _give(_DONE), _load(low + 4), *_when(_EQUAL, 0, _ALLOW)]
    return [
        _load(_argument(1)),
        _jump(_EQUAL, _RLIMIT_CORE, no=len(ask) + 1),
        *ask,
        _give(_DONE),
        _give(_ALLOW),
    ]


def _ranges(found: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, last) of each unbroken run."""
    runs: list[tuple[int, int]] = []
    for number in found:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _argument(index: int) -> int:
    """Where the low word of an argument is in `struct seccomp_data`."""
    return 16 + 8 * index


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", _LOAD, 0, 0, offset)


def _jump(test: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", test, yes, no, value)


def _give(verdict: int) -> bytes:
    return struct.pack("=HBBI", _RETURN, 0, 0, verdict)


def _when(test: int, value: int, verdict: int) -> list[bytes]:
    return [_jump(test, value, no=1), _give(verdict)]
