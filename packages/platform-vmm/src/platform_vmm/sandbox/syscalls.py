"""The guest's system call filter: the few calls that no challenge needs and that reach past namespaces.

A deny list on purpose: the SDK makes a sandbox of its own inside, so namespaces, mounts and pivot_root
stay allowed here; the inner sandbox is where a strict allow list belongs. Built by hand as a classic BPF
program (struct sock_filter), as `bwrap --seccomp` reads it.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST, _THIRD = 0, 4, 16, 32
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_X32 = 0x40000000
_NETLINK = 16
_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6. AF_VSOCK is in no network namespace: it would reach the hypervisor."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Linux's numbers for one machine. `audit` is AUDIT_ARCH_*; `denied` maps names to numbers."""

    audit: int
    socket: int
    denied: Mapping[str, int]


_COMMON = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_getfd": 438}
_COMMON |= {"quotactl_fd": 443, "memfd_secret": 447}
_X86_64 = {"ptrace": 101, "syslog": 103, "acct": 163, "settimeofday": 164, "swapon": 167, "swapoff": 168}
_X86_64 |= {"reboot": 169, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176}
_X86_64 |= {"quotactl": 179, "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249}
_X86_64 |= {"keyctl": 250, "perf_event_open": 298, "fanotify_init": 300, "open_by_handle_at": 304}
_X86_64 |= {"process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313}
_X86_64 |= {"kexec_file_load": 320, "bpf": 321, "userfaultfd": 323}
_AARCH64 = {"quotactl": 60, "acct": 89, "kexec_load": 104, "init_module": 105, "delete_module": 106}
_AARCH64 |= {"clock_settime": 112, "syslog": 116, "ptrace": 117, "reboot": 142, "settimeofday": 170}
_AARCH64 |= {"add_key": 217, "request_key": 218, "keyctl": 219, "swapon": 224, "swapoff": 225}
_AARCH64 |= {"perf_event_open": 241, "fanotify_init": 262, "open_by_handle_at": 265}
_AARCH64 |= {"process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273}
_AARCH64 |= {"bpf": 280, "userfaultfd": 282, "kexec_file_load": 294}
ARCHITECTURES = {
    "x86_64": Architecture(0xC000003E, 41, _X86_64 | _COMMON),
    "aarch64": Architecture(0xC00000B7, 198, _AARCH64 | _COMMON),
}


def guest_filter(machine: str | None = None) -> bytes | None:
    """The program; None on a machine whose numbers are not known here.

    Foreign calling conventions (32 bit, x32) kill; a denied call is EPERM, a denied address family
    EAFNOSUPPORT, io_uring ENOSYS, so that libraries fall back.
    """
    architecture = ARCHITECTURES.get(machine or platform.machine())
    if architecture is None:
        return None
    program = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, architecture.audit, yes=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_AT_LEAST, _X32, no=1),
        _step(_RETURN, _KILL),
    ]
    for name, number in sorted(architecture.denied.items()):
        refusal = errno.ENOSYS if name.startswith("io_uring") else errno.EPERM
        program += [_step(_EQUAL, number, no=1), _step(_RETURN, _REFUSE | refusal)]
    family = [_step(_LOAD, _FIRST)]
    for allowed in _FAMILIES:
        family += [_step(_EQUAL, allowed, no=1), _step(_RETURN, _ALLOW)]
    family += [
        _step(_EQUAL, _NETLINK, no=3),
        _step(_LOAD, _THIRD),
        _step(_EQUAL, 0, no=1),
        _step(_RETURN, _ALLOW),
        _step(_RETURN, _REFUSE | errno.EAFNOSUPPORT),
    ]
    program += [_step(_EQUAL, architecture.socket, no=len(family)), *family, _step(_RETURN, _ALLOW)]
    return b"".join(program)


def _step(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)
