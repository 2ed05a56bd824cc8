"""Runs untrusted code in a sandbox of its own: namespaces, no network, capped memory, files, output, time.

Made for the inside of a CVM, as an ordinary user without capabilities; bubblewrap does the namespaces.
The whole tree is killed at the end: when its first process dies, its pid namespace dies.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from platform_challenge_sdk.errors import ContainmentUnavailable

MIB = 1024 * 1024
OUTPUT_BYTES = 4 * MIB
_PROCESSES = 128
_TMP_BYTES = 16 * MIB
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin"}
_CHUNK = 65536
_GRACE = 5.0
_SIGNALLED = 128


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run used: milliseconds and bytes. None: not measured here."""

    wall_ms: int
    cpu_time_ms: int | None
    memory_peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. `killed_by`: None, `timeout`, `output`, `cancelled` or `signal:<number>`."""

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


@dataclass(frozen=True, slots=True)
class Order:
    """One run, wholly decided. Sizes in bytes, `timeout` in seconds."""

    argv: Sequence[str]
    submission: Path
    stdin: bytes
    timeout: float
    memory: int
    files: Mapping[str, bytes]
    disk: int
    output: int = OUTPUT_BYTES


def run_contained(order: Order, cancelled: threading.Event | None = None) -> Outcome:
    """Run it and wait for the end of its whole tree. Blocks; call it in a worker thread.

    Raises:
        ContainmentUnavailable: bubblewrap is missing, or may make no namespaces here: nothing was run.
    """
    bwrap, prlimit, choom = (_program(name) for name in ("bwrap", "prlimit", "choom"))
    files = {name: _memory_file(name, data) for name, data in order.files.items()}
    status_read, status_write = os.pipe()
    arguments = _memory_file("arguments", _arguments(order, files))
    inherited = [*files.values(), arguments, status_write]
    command = [
        *(choom, "-n", "1000", "--"),
        *(
            prlimit,
            f"--as={order.memory}",
            f"--nproc={_PROCESSES}",
            "--core=0",
            "--nofile=1024",
            "--msgqueue=0",
        ),
        *(f"--fsize={order.disk}", "--memlock=65536", "--"),
        *(bwrap, "--args", str(arguments), "--json-status-fd", str(status_write), "--", *order.argv),
    ]
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=inherited,
            env={},
            cwd="/",
        )
    except OSError as error:
        os.close(status_read)
        raise ContainmentUnavailable(f"the sandbox could not be started: {error}") from error
    finally:
        for descriptor in inherited:
            os.close(descriptor)
    pump = _Pump(process, order, began, cancelled)
    try:
        pump.run()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        _, status = os.waitpid(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        pump.close()
        with os.fdopen(status_read, "rb") as told:
            started = b"exit-code" in told.read() or pump.killed_by is not None
    if not started and process.returncode != 0 and pump.stderr.startswith(b"bwrap:"):
        reason = bytes(pump.stderr[:512]).decode("utf-8", "replace").strip()
        raise ContainmentUnavailable(f"no sandbox can be made here, so the submission was not run: {reason}")
    code = process.returncode if process.returncode >= 0 else _SIGNALLED - process.returncode
    killed_by = pump.killed_by
    if killed_by is None and code > _SIGNALLED:
        killed_by = f"signal:{code - _SIGNALLED}"
    return Outcome(
        exit=code,
        stdout=bytes(pump.stdout),
        stderr=bytes(pump.stderr),
        killed_by=killed_by,
        usage=Usage(
            wall_ms=int((time.monotonic() - began) * 1000),
            cpu_time_ms=None,
            memory_peak_bytes=None,
        ),
    )


class _Pump:
    """Feeds stdin and reads both outputs until they close, time is up, or there is too much."""

    def __init__(
        self, process: subprocess.Popen[bytes], order: Order, began: float, cancelled: threading.Event | None
    ) -> None:
        self._process = process
        self._stdin = memoryview(order.stdin)
        self._output = order.output
        self._deadline = began + order.timeout
        self._cancelled = cancelled
        self._selector = selectors.DefaultSelector()
        self.stdout, self.stderr = bytearray(), bytearray()
        self.killed_by: str | None = None
        for stream, sink in ((process.stdout, self.stdout), (process.stderr, self.stderr)):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                self._selector.register(stream, selectors.EVENT_READ, sink)
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            self._selector.register(process.stdin, selectors.EVENT_WRITE)

    def run(self) -> None:
        """Until the end."""
        outputs = 2
        ended: float | None = None
        while outputs:
            now = time.monotonic()
            if self._must_end(now):
                os.kill(self._process.pid, signal.SIGKILL)
                return
            if ended is None and self._exited():
                ended = now
            if ended is not None and now - ended > _GRACE:
                return
            for key, _ in self._selector.select(min(0.05, max(0.0, self._deadline - now))):
                if key.data is None:
                    self._feed()
                elif not self._take(key):
                    outputs -= 1
        self._wait_for_exit()

    def close(self) -> None:
        """Close our ends of the pipes."""
        self._selector.close()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _wait_for_exit(self) -> None:
        while not self._exited():
            if self._must_end(time.monotonic()):
                os.kill(self._process.pid, signal.SIGKILL)
                return
            time.sleep(0.005)

    def _exited(self) -> bool:
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _must_end(self, now: float) -> bool:
        if self._cancelled is not None and self._cancelled.is_set():
            self.killed_by = "cancelled"
        elif now >= self._deadline:
            self.killed_by = "timeout"
        elif len(self.stdout) + len(self.stderr) > self._output:
            self.killed_by = "output"
            del self.stdout[self._output :]
            del self.stderr[self._output :]
        return self.killed_by is not None

    def _take(self, key: selectors.SelectorKey) -> bool:
        chunk = os.read(key.fd, _CHUNK)
        key.data.extend(chunk)
        if not chunk:
            self._selector.unregister(key.fileobj)
        return bool(chunk)

    def _feed(self) -> None:
        stream = self._process.stdin
        if stream is None:
            return
        try:
            self._stdin = self._stdin[os.write(stream.fileno(), self._stdin[:_CHUNK]) :]
        except BrokenPipeError:
            self._stdin = memoryview(b"")
        except BlockingIOError:
            return
        if not self._stdin:
            self._selector.unregister(stream)
            with contextlib.suppress(OSError):
                stream.close()
            self._process.stdin = None


def _arguments(order: Order, files: Mapping[str, int]) -> bytes:
    words = ["--unshare-all", "--unshare-user", "--uid", "0", "--gid", "0", "--disable-userns"]
    words += [
        "--die-with-parent",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--hostname",
        "submission",
        "--clearenv",
    ]
    environment = {"PATH": f"{sys.prefix}/bin:{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"}
    environment |= {"HOME": "/work", "LANG": "C.UTF-8", "TMPDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}  # noqa: S108 - the sandbox's own
    for name, value in environment.items():
        words += ["--setenv", name, value]
    words += ["--ro-bind", "/usr", "/usr"]
    for name, target in _LINKS.items():
        if Path("/", name).is_symlink():
            words += ["--symlink", target, f"/{name}"]
        elif Path("/", name).is_dir():
            words += ["--ro-bind", f"/{name}", f"/{name}"]
    words += ["--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for prefix in sorted({sys.prefix, sys.base_prefix}):
        if not prefix.startswith("/usr"):
            words += ["--ro-bind", prefix, prefix]
    words += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    words += ["--size", str(order.disk), "--tmpfs", "/work", "--size", str(_TMP_BYTES), "--tmpfs", "/tmp"]  # noqa: S108 - as above
    words += ["--ro-bind", str(order.submission), "/submission"]
    for name, descriptor in files.items():
        words += ["--file", str(descriptor), f"/work/{_plain(name)}"]
    words += ["--remount-ro", "/", "--chdir", "/submission"]
    return b"".join(os.fsencode(word) + b"\0" for word in words)


def _plain(name: str) -> str:
    if not name or name.startswith((".", "/")) or "/" in name or "\0" in name:
        raise ValueError(f"files: expected a plain file name, got {name!r}")
    return name


def _memory_file(name: str, data: bytes) -> int:
    descriptor = os.memfd_create(name[:64], os.MFD_CLOEXEC)
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


def describe_end(outcome: Outcome) -> str:
    """How it ended, in words, with the end of its stderr: for a message to the miner."""
    if outcome.killed_by == "timeout":
        how = "did not end in time and was killed"
    elif outcome.killed_by == "output":
        how = "wrote too much and was killed"
    elif outcome.killed_by is not None and outcome.killed_by.startswith("signal:"):
        number = int(outcome.killed_by.removeprefix("signal:"))
        known = number in set(signal.Signals)
        how = f"was killed by {signal.Signals(number).name if known else number}"
    else:
        how = f"ended with exit code {outcome.exit}"
    tail = outcome.stderr[-600:].decode("utf-8", "replace").strip()
    return f"the submission {how}" + (f": {tail}" if tail else "")
