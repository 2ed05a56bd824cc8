"""Runs untrusted code in a sandbox of its own: no network, capped memory, files, output and time.

Made for the inside of a CVM. `stage.py` is the helper process around each run; inside it are bubblewrap's
namespaces or, where there are none, Landlock (`containment.py`). When a run returns, nothing of its tree is
left.
"""

from __future__ import annotations

import contextlib
import json
import os
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

from platform_challenge_sdk.containment import NAMESPACES, Containment
from platform_challenge_sdk.errors import ContainmentUnavailable
from platform_challenge_sdk.means import MIB, Egress
from platform_challenge_sdk.pump import Pump
from platform_challenge_sdk.recipe import OUTPUT_BYTES, Order
from platform_challenge_sdk.relay import ADDRESS, PORT, Relay
from platform_challenge_sdk.room import made_room
from platform_challenge_sdk.seccomp import submission_filter

__all__ = ["MIB", "OUTPUT_BYTES", "Order", "Outcome", "Usage", "describe_end", "run_contained"]

_STAGE = Path(__file__).with_name("stage.py")
NOT_RUN = "no sandbox can be made here, so the submission was not run: "
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

    `killed_by`: None (it ended by itself), `timeout`, `memory` (the tree together used too much), `disk`
    (too many or too large files, where there is no mount namespace to say so at once), `output`,
    `cancelled`, or `signal:<number>` (its first process died of one; 9 is also the kernel's out of memory).
    `containment`: what held it, and what fell away of the guarantees.
    """

    exit: int
    stdout: bytes
    stderr: bytes
    killed_by: str | None
    usage: Usage
    containment: Containment = NAMESPACES

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.exit == 0 and self.killed_by is None

    @property
    def text(self) -> str:
        """Stdout as UTF-8, with anything else replaced."""
        return self.stdout.decode("utf-8", "replace")


def run_contained(
    order: Order, cancelled: Sequence[threading.Event] = (), containment: Containment = NAMESPACES
) -> Outcome:
    """Run it and wait for the end of its whole tree. Blocks; call it in a worker thread.

    Any of `cancelled` that is set ends it.

    Raises:
        ContainmentUnavailable: This containment cannot be had here: nothing was run.
    """
    try:
        if order.egress is not None and containment.kind != "namespaces":
            raise ContainmentUnavailable(f"network=True needs a network namespace; here is {containment}")
        if containment.kind == "namespaces":
            return _outcome(_in_namespaces(order, cancelled), containment)
        return _outcome(_confined(order, cancelled, containment), containment)
    except OSError as error:
        raise ContainmentUnavailable(f"the sandbox could not be started: {error}") from error


def _in_namespaces(order: Order, cancelled: Sequence[threading.Event]) -> Pump:
    bwrap = _program("bwrap")
    room = tempfile.mkdtemp(prefix="contained-")
    with contextlib.ExitStack() as held:
        held.callback(_remove_empty, Path(room))
        files = {name: _memory_file(held, "file", data) for name, data in order.files.items()}
        filter_file = _memory_file(held, "seccomp", submission_filter())
        arguments = order.arguments(room, files, filter_file)
        packed = _memory_file(held, "arguments", b"".join(os.fsencode(word) + b"\0" for word in arguments))
        inherited = [*files.values(), filter_file, packed]
        return _staged(
            order,
            cancelled,
            inherited,
            room=room,
            bwrap=bwrap,
            arguments=["--args", str(packed), "--", *order.argv],
            inherit=inherited,
            binds=order.binds(),
            uid=_FIRST_UID + os.getpid() % _UIDS,
            relay=None if order.egress is None else (ADDRESS, PORT),
        )


def _confined(order: Order, cancelled: Sequence[threading.Event], containment: Containment) -> Pump:
    with (
        made_room(order.submission, order.files, own_uid=containment.own_uid) as room,
        contextlib.ExitStack() as held,
    ):
        decided = order.confined(room.path, room.submission, containment, room.uid)
        filter_file = _memory_file(held, "seccomp", submission_filter(containment.walls))
        decided["confined"]["filter"] = filter_file
        pump = _staged(order, cancelled, [filter_file], room=str(room.path), **decided)
        if not pump.report:
            room.end_all()
        return pump


def _staged(order: Order, cancelled: Sequence[threading.Event], inherited: list[int], **told: Any) -> Pump:
    """Run a stage to its end. `told`: what it is to know besides the order's limits."""
    ours, theirs = socket.socketpair()
    with ours, contextlib.ExitStack() as held:
        held.callback(theirs.close)
        limits = {"disk": order.disk, "memory": order.memory, "timeout": order.timeout}
        config = told | limits | {"rlimits": order.rlimits(), "control": theirs.fileno()}
        config_file = _memory_file(held, "config", json.dumps(config).encode())
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_STAGE), str(config_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[*inherited, config_file, theirs.fileno()],
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            cwd="/",
        )
        held.close()
        deadline = time.monotonic() + order.timeout + _GRACE
        pump = Pump(
            process, ours, stdin=order.stdin, limit=order.output, deadline=deadline, cancelled=cancelled
        )
        way_out = None
        try:
            if order.egress is not None:
                way_out = _relay(ours, order.egress, pump)
            pump.run()
        finally:
            pump.close()
            _end(process, overdue=pump.overdue, holds_alone="confined" in told)
            if way_out is not None:
                way_out.close()
    return pump


def _relay(control: socket.socket, egress: Egress, pump: Pump) -> Relay | None:
    """The relay on the socket that the stage gives; None when it reports instead why it cannot."""
    control.settimeout(_GRACE)
    first, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    control.setblocking(False)
    if descriptors:
        return Relay(socket.socket(fileno=descriptors[0]), egress)
    pump.report += first
    return None


def _end(process: subprocess.Popen[bytes], *, overdue: bool, holds_alone: bool) -> None:
    """Wait for the stage, which ends when nothing of the run is left; the control socket is closed.

    `holds_alone`: no namespace dies with the stage, so it must be let finish, however long it takes.
    """
    if holds_alone:
        process.wait()
        return
    if overdue:
        process.kill()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _outcome(pump: Pump, containment: Containment) -> Outcome:
    report: dict[str, Any] = json.loads(pump.report) if pump.report else {}
    # Before the submission's command is executed, only bubblewrap can have written this.
    unfound = "code" in report and not report["started"] and pump.stderr.startswith(_NO_COMMAND)
    if unfound or report.get("missing"):
        report["code"] = _NOT_FOUND
    elif not report.get("started"):
        reason = report.get("failed") or bytes(pump.stderr[-512:]).decode("utf-8", "replace").strip()
        raise ContainmentUnavailable(NOT_RUN + (reason or "the stage died"))
    code, killed_by = int(report["code"]), report["killed_by"]
    if pump.flooded:
        killed_by = "output"
    elif killed_by is None and code > _SIGNALLED:
        killed_by = f"signal:{code - _SIGNALLED}"
    usage = Usage(report["wall_ms"], report["cpu_ms"], report["peak"])
    return Outcome(code, bytes(pump.stdout), bytes(pump.stderr), killed_by, usage, containment)


def _memory_file(held: contextlib.ExitStack, name: str, data: bytes) -> int:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    held.callback(os.close, descriptor)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _program(name: str) -> str:
    found = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin")
    if found is None:
        raise ContainmentUnavailable(f"{name} is not in this image, so the submission was not run")
    return found


_ENDS: dict[str, str] = {
    "timeout": "did not end in time and was killed",
    "output": "wrote too much and was killed",
    "memory": "used too much memory and was killed",
    "disk": "wrote more or larger files than it may and was killed",
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
