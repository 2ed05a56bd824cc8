"""The guest's system call filter: an allow list of what programs, and the SDK's own sandbox, need.

A classic BPF program (struct sock_filter), built by hand as `bwrap --seccomp` reads it. The SDK makes a
sandbox of its own inside, so namespaces, mounts and pivot_root are on the list; the submission's stricter
filter is the SDK's. What is on no list does not exist (ENOSYS), so that libraries fall back.
"""

from __future__ import annotations

import errno
import platform
import struct

from platform_vmm.sandbox.syscall_table import MACHINES, allowed, refused

AUDIT = dict(zip(MACHINES, (0xC000003E, 0xC00000B7), strict=True))
"""AUDIT_ARCH_* of each machine: a call by another convention has other numbers."""
_LOAD, _RETURN = 0x20, 0x06
_EQUAL, _ABOVE, _AT_LEAST = 0x15, 0x25, 0x35
_NUMBER, _ARCHITECTURE = 0, 4
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_X32 = 0x40000000
_NETLINK = 16
_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6. AF_VSOCK is in no network namespace: it would reach the hypervisor."""
_RLIMIT_CORE = 4
_TERMINAL_INPUT = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX put words into a terminal that somebody else reads."""
_SET_LEASE = 1024
"""F_SETLEASE lets the owner of a file keep others from opening it, for 45 s each time. Guests share files."""


def guest_filter(machine: str | None = None) -> bytes | None:
    """The program; None on a machine whose numbers are not known here.

    Foreign calling conventions (32 bit, x32) kill; what is refused by name is EPERM, an address family
    EAFNOSUPPORT. clone3 is on no list: its flags lie in memory where no filter sees them, and glibc falls
    back to clone.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        return None
    calls = allowed(machine)
    program = [_step(_LOAD, _ARCHITECTURE), _step(_EQUAL, AUDIT[machine], yes=1), _give(_KILL)]
    program += [_step(_LOAD, _NUMBER), *_when(_AT_LEAST, _X32, _KILL)]
    checked = {
        "socket": _socket(),
        "socketpair": _socketpair(),
        "ioctl": _without(_TERMINAL_INPUT),
        "fcntl": _without((_SET_LEASE,)),
        "setrlimit": _core(0),
        "prlimit64": _core(1, 2),
    }
    for name, block in checked.items():
        program += [_step(_EQUAL, calls.pop(name), no=len(block)), *block]
    for number in refused(machine).values():
        program += _when(_EQUAL, number, _REFUSE | errno.EPERM)
    for first, last in _runs(sorted(calls.values())):
        # Ascending: what is below a run lies in the gap before it.
        program += [_step(_AT_LEAST, first, yes=1), _give(_REFUSE | errno.ENOSYS)]
        program += [_step(_ABOVE, last, yes=1), _give(_ALLOW)]
    return b"".join([*program, _give(_REFUSE | errno.ENOSYS)])


def _socket() -> list[bytes]:
    """By family; of netlink only routes, which tell a program its own addresses."""
    block = [_step(_LOAD, _argument(0))]
    for family in _FAMILIES:
        block += _when(_EQUAL, family, _ALLOW)
    block += [_step(_EQUAL, _NETLINK, yes=1), _give(_REFUSE | errno.EAFNOSUPPORT), _step(_LOAD, _argument(2))]
    return [*block, *_when(_EQUAL, 0, _ALLOW), _give(_REFUSE | errno.EAFNOSUPPORT)]


def _socketpair() -> list[bytes]:
    """Unix alone: of another family the kernel makes two sockets, or loads its module, before it says no."""
    block = [_step(_LOAD, _argument(0)), *_when(_EQUAL, _FAMILIES[0], _ALLOW)]
    return [*block, _give(_REFUSE | errno.EAFNOSUPPORT)]


def _without(requests: tuple[int, ...]) -> list[bytes]:
    """All that the second argument can ask for but these."""
    block = [_step(_LOAD, _argument(1))]
    for request in requests:
        block += _when(_EQUAL, request, _REFUSE | errno.EPERM)
    return [*block, _give(_ALLOW)]


def _core(resource: int, limit: int | None = None) -> list[bytes]:
    """Setting RLIMIT_CORE is said to be done and is not: it stays as the driver set it, at 1.

    At 1, and at no other value, the kernel starts no handler of core dumps (core_pattern with a pipe), which
    would be root's, outside, and fed by the guest. Arguments are by index; `limit`: a null one only asks.
    """
    block = [_step(_LOAD, _argument(resource)), _step(_EQUAL, _RLIMIT_CORE, yes=1), _give(_ALLOW)]
    if limit is not None:
        high = [_step(_LOAD, _argument(limit) + 4), _step(_EQUAL, 0, no=1), _give(_ALLOW)]
        block += [_step(_LOAD, _argument(limit)), _step(_EQUAL, 0, no=len(high)), *high]
    return [*block, _give(_REFUSE)]


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, last) of each unbroken run."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _argument(index: int) -> int:
    """Where the low word of an argument lies in `struct seccomp_data`."""
    return 16 + 8 * index


def _when(test: int, value: int, verdict: int) -> list[bytes]:
    return [_step(test, value, no=1), _give(verdict)]


def _give(verdict: int) -> bytes:
    return _step(_RETURN, verdict)


def _step(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)
