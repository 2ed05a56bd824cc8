"""Runs untrusted code in a sandbox of its own: namespaces, no network, capped memory, files, output, time.

Made for the inside of a CVM, as an ordinary user without capabilities; bubblewrap does the namespaces and
`stage.py` what comes before and after it. When a run returns, nothing of its tree is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platform_challenge_sdk.errors import ContainmentUnavailable
from platform_challenge_sdk.pump import Pump
from platform_challenge_sdk.recipe import MIB, OUTPUT_BYTES, Order
from platform_challenge_sdk.seccomp import submission_filter

__all__ = ["MIB", "OUTPUT_BYTES", "Order", "Outcome", "Usage", "describe_end", "run_contained"]

_STAGE = Path(__file__).with_name("stage.py")
_GRACE = 20.0
_SIGNALLED = 128
_NOT_FOUND, _NO_COMMAND = 127, b"bwrap: execvp "
_FIRST_UID, _UIDS = 61_000, 4_000


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run used. `cpu_time_ms` is the whole tree's.

    `memory_peak_bytes` is the larger of the largest single process and the whole tree, looked at every 50 ms;
    pages that processes share since a fork count for each.
    """

    wall_ms: int
    cpu_time_ms: int
    memory_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended; `exit` as a shell has it: 128 + number for a signal, 127 for a command not found.

    `killed_by`: None (it ended by itself), `timeout`, `memory` (the tree together used too much), `output`,
    `cancelled`, or `signal:<number>` (its first process died of one; 9 is also the kernel's out of memory).
    """

    exit: int
    stdout: bytes
    stderr: bytes
    killed_by: str | None
    usage: Usage

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.exit == 0 and self.killed_by is None

    @property
    def text(self) -> str:
        """Stdout as UTF-8, with anything else replaced."""
        return self.stdout.decode("utf-8", "replace")


def run_contained(order: Order, cancelled: Sequence[threading.Event] = ()) -> Outcome:
    """Run it and wait for the end of its whole tree. Blocks; call it in a worker thread.

    Any of `cancelled` that is set ends it.

    Raises:
        ContainmentUnavailable: bubblewrap is missing, or may make no namespaces here: nothing was run.
    """
    if platform.machine() != "x86_64":
        raise ContainmentUnavailable(f"expected an x86_64 machine for the filter, got {platform.machine()}")
    bwrap = _program("bwrap")
    room = tempfile.mkdtemp(prefix="contained-")
    ours, theirs = socket.socketpair()
    try:
        process, pump = _start(order, bwrap, room, ours, theirs, cancelled)
        try:
            pump.run()
        finally:
            pump.close()
            _end(process, overdue=pump.overdue)
    finally:
        ours.close()
        with contextlib.suppress(OSError):
            Path(room).rmdir()
    return _outcome(pump)


def _start(
    order: Order,
    bwrap: str,
    room: str,
    ours: socket.socket,
    theirs: socket.socket,
    cancelled: Sequence[threading.Event],
) -> tuple[subprocess.Popen[bytes], Pump]:
    descriptors: list[int] = []

    def held(name: str, data: bytes) -> int:
        descriptors.append(_memory_file(name, data))
        return descriptors[-1]

    try:
        files = {name: held("file", data) for name, data in order.files.items()}
        arguments = order.arguments(room, files, held("seccomp", submission_filter()))
        packed = held("arguments", b"".join(os.fsencode(word) + b"\0" for word in arguments))
        config = {
            "bwrap": bwrap,
            "arguments": ["--args", str(packed), "--", *order.argv],
            "inherit": list(descriptors),
            "room": room,
            "binds": order.binds(),
            "disk": order.disk,
            "memory": order.memory,
            "timeout": order.timeout,
            "rlimits": order.rlimits(),
            "uid": _FIRST_UID + os.getpid() % _UIDS,
            "control": theirs.fileno(),
        }
        told = held("config", json.dumps(config).encode())
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_STAGE), str(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[*descriptors, theirs.fileno()],
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            cwd="/",
        )
    except OSError as error:
        raise ContainmentUnavailable(f"the sandbox could not be started: {error}") from error
    finally:
        theirs.close()
        for descriptor in descriptors:
            os.close(descriptor)
    deadline = time.monotonic() + order.timeout + _GRACE
    pump = Pump(process, ours, stdin=order.stdin, limit=order.output, deadline=deadline, cancelled=cancelled)
    return process, pump


def _end(process: subprocess.Popen[bytes], *, overdue: bool) -> None:
    """Wait for the stage, which ends when nothing of the run is left; the control socket is closed."""
    if overdue:
        process.kill()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _outcome(pump: Pump) -> Outcome:
    report: dict[str, Any] = json.loads(pump.report) if pump.report else {}
    # Before the submission's command is executed, only bubblewrap can have written this.
    missing = "code" in report and not report["started"] and pump.stderr.startswith(_NO_COMMAND)
    if missing:
        report["code"] = _NOT_FOUND
    elif not report.get("started"):
        reason = report.get("failed") or bytes(pump.stderr[-512:]).decode("utf-8", "replace").strip()
        raise ContainmentUnavailable(
            f"no sandbox can be made here, so the submission was not run: {reason or 'the stage died'}"
        )
    code, killed_by = int(report["code"]), report["killed_by"]
    if pump.flooded:
        killed_by = "output"
    elif killed_by is None and code > _SIGNALLED:
        killed_by = f"signal:{code - _SIGNALLED}"
    usage = Usage(report["wall_ms"], report["cpu_ms"], report["peak"])
    return Outcome(code, bytes(pump.stdout), bytes(pump.stderr), killed_by, usage)


def _memory_file(name: str, data: bytes) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _program(name: str) -> str:
    found = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin")
    if found is None:
        raise ContainmentUnavailable(f"{name} is not in this image, so the submission was not run")
    return found


_ENDS: dict[str, str] = {
    "timeout": "did not end in time and was killed",
    "output": "wrote too much and was killed",
    "memory": "used too much memory and was killed",
    "cancelled": "was cancelled",
}


def describe_end(outcome: Outcome) -> str:
    """How it ended, in words, with the end of its stderr: for a message to the miner."""
    tail = outcome.stderr[-600:].decode("utf-8", "replace").strip()
    return f"the submission {_how(outcome)}" + (f": {tail}" if tail else "")


def _how(outcome: Outcome) -> str:
    killed_by = outcome.killed_by
    if killed_by is None:
        return f"ended with exit code {outcome.exit}"
    if not killed_by.startswith("signal:"):
        return _ENDS.get(killed_by, f"was killed: {killed_by}")
    number = int(killed_by.removeprefix("signal:"))
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return (
            f"was killed by signal {number}"
            if number < signal.NSIG
            else f"ended with exit code {outcome.exit}"
        )
