"""Landlock: what a run may do with files, TCP and signals, where namespaces cannot say it.

The kernel's own byte forms (`landlock(7)`), for whatever version of them it has: each version knows more
rights, and what it does not know it cannot refuse.
"""

from __future__ import annotations

import ctypes
import struct

_CREATE_RULESET, _ASK_VERSION = 444, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_FIRST_RIGHTS = (1 << 13) - 1
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_TCP_BIND_AND_CONNECT = 3
_ABSTRACT_SOCKETS_AND_SIGNALS = 3
MOVES, TRUNCATION, TCP, DEVICES, SIGNALS = 2, 3, 4, 5, 6
"""The version from which each of these is kept in."""

READ = _EXECUTE | _READ_FILE | _READ_DIR
USE = _READ_FILE | _WRITE_FILE
"""A device's file: to read and write, but no ioctl."""


def version() -> int:
    """The kernel's; 0: there is none, or it is switched off."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(
        ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION)
    )
    return max(0, int(found))


def file_rights(known: int) -> int:
    """All rights over files that version `known` can refuse."""
    rights = _FIRST_RIGHTS
    for since, right in ((MOVES, _REFER), (TRUNCATION, _TRUNCATE), (DEVICES, _IOCTL_DEV)):
        rights |= right if known >= since else 0
    return rights


def write_rights(known: int) -> int:
    """Everything in a folder of one's own, but devices and sockets."""
    return file_rights(known) & ~(_MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK | _IOCTL_DEV)


def ruleset(known: int) -> bytes:
    """`struct landlock_ruleset_attr` that refuses everything which no rule allows."""
    attributes = struct.pack("=Q", file_rights(known))
    if known >= TCP:
        attributes += struct.pack("=Q", _TCP_BIND_AND_CONNECT)
    if known >= SIGNALS:
        attributes += struct.pack("=Q", _ABSTRACT_SOCKETS_AND_SIGNALS)
    return attributes


def signal_fence() -> bytes:
    """The ruleset of a process whose signals are to reach nobody but what it starts (from SIGNALS on)."""
    return struct.pack("=QQQ", 0, 0, _ABSTRACT_SOCKETS_AND_SIGNALS)
