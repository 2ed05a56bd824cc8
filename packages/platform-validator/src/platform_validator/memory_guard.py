"""Keeps what is in a process's memory from others: no core file, no reader of its environment or memory."""

from __future__ import annotations

import contextlib
import ctypes
import resource

_PR_SET_DUMPABLE = 4


def guard_memory() -> None:
    """From here on nothing of this process's memory is left behind or shown, the hotkey in it least of all.

    The core limit is 1 byte, the one value at which the kernel starts no handler of crashes either (with 0 it
    does, core(5)). A process that is not dumpable leaves no core file, and root alone reads its
    `/proc/PID/environ`, which keeps what it was started with, or traces it (prctl(2)).
    """
    with contextlib.suppress(ValueError, OSError):  # a hard limit of 0 is not raised
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
