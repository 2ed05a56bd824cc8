"""The submission's own system call filter: what a program needs, without the kernel's odd corners.

A classic BPF program for x86-64, as `seccomp(2)` takes it and bubblewrap loads it. Names and numbers are
the kernel's (arch/x86/entry/syscalls/syscall_64.tbl, Linux 6.10).
"""

from __future__ import annotations

import struct

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH = 0, 4
_X86_64 = 0xC000003E
_X32 = 0x40000000
_FIRST_UNKNOWN = 463
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97

_DENIED = {
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "statmount": 457,
    "listmount": 458, "setns": 308, "unshare": 272, "ptrace": 101, "process_vm_readv": 310,
    "process_vm_writev": 311, "process_madvise": 440, "pidfd_getfd": 438, "kcmp": 312, "bpf": 321,
    "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "add_key": 248, "request_key": 249, "keyctl": 250, "kexec_load": 246,
    "kexec_file_load": 320, "create_module": 174, "init_module": 175, "delete_module": 176,
    "get_kernel_syms": 177, "query_module": 178, "finit_module": 313, "reboot": 169, "swapon": 167,
    "swapoff": 168, "acct": 163, "quotactl": 179, "quotactl_fd": 443, "nfsservctl": 180, "syslog": 103,
    "iopl": 172, "ioperm": 173, "settimeofday": 164, "clock_settime": 227, "clock_adjtime": 305,
    "adjtimex": 159, "sethostname": 170, "setdomainname": 171, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "fanotify_init": 300, "fanotify_mark": 301, "mbind": 237,
    "set_mempolicy": 238, "get_mempolicy": 239, "migrate_pages": 256, "move_pages": 279,
    "set_mempolicy_home_node": 450, "vmsplice": 278, "modify_ldt": 154, "memfd_secret": 447,
    "personality": 135, "mknod": 133, "mknodat": 259, "lookup_dcookie": 212, "uselib": 134, "ustat": 136,
    "sysfs": 139, "_sysctl": 156, "vhangup": 153,
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET, _IOCTL = 56, 435, 41, 16
_NEW_NAMESPACES = 0x7E020000
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C


def submission_filter() -> bytes:
    """The filter, an array of `struct sock_filter`.

    Another architecture's and x32's calls kill the process. clone3 does not exist, since its flags cannot
    be read here: glibc then uses clone. Sockets are Unix, IPv4, IPv6 and route netlink; there is no vsock,
    which no network namespace would keep in. Numbers that this table does not know do not exist.
    """
    program = [
        _load(_ARCH),
        _jump(_EQUAL, _X86_64, yes=1),
        _give(_KILL),
        _load(_NUMBER),
        *_when(_AT_LEAST, _X32, _KILL),
        *_when(_AT_LEAST, _FIRST_UNKNOWN, _ERRNO | _ENOSYS),
        *_when(_EQUAL, _CLONE3, _ERRNO | _ENOSYS),
    ]
    for number in _DENIED.values():
        program += _when(_EQUAL, number, _ERRNO | _EPERM)
    clone = [_load(_argument(0)), *_when(_ANY_BIT, _NEW_NAMESPACES, _ERRNO | _EPERM), _give(_ALLOW)]
    socket = [_load(_argument(0))]
    for family in (_UNIX, _INET, _INET6):
        socket += _when(_EQUAL, family, _ALLOW)
    socket += [_jump(_EQUAL, _NETLINK, yes=1), _give(_ERRNO | _EAFNOSUPPORT), _load(_argument(2))]
    socket += [*_when(_EQUAL, 0, _ALLOW), _give(_ERRNO | _EAFNOSUPPORT)]
    ioctl = [_load(_argument(1))]
    for request in (_TIOCSTI, _TIOCLINUX):
        ioctl += _when(_EQUAL, request, _ERRNO | _EPERM)
    ioctl.append(_give(_ALLOW))
    for number, block in ((_CLONE, clone), (_SOCKET, socket), (_IOCTL, ioctl)):
        program += [_jump(_EQUAL, number, no=len(block)), *block]
    return b"".join([*program, _give(_ALLOW)])


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
