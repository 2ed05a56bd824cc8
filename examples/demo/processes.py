"""The demo's own processes: started in sessions of their own, written down, and always ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "PLATFORM_DEMO_RUN"
"""Environment variable that every process of a run carries; its value is the run's state directory."""


class DemoFailed(Exception):
    """The demo cannot go on; the message says why and where the log is."""


@dataclass(slots=True)
class Part:
    """One running process of ours."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    argv: Sequence[str]
    environment: Mapping[str, str]


@dataclass(slots=True)
class Processes:
    """Starts parts with logs under `state/logs`; remembers pid and start time in `state/processes.json`."""

    state: Path
    parts: dict[str, Part] = field(default_factory=dict)

    def start(self, name: str, argv: Sequence[str], environment: Mapping[str, str]) -> Part:
        """Start a part. Its output is appended to `logs/<name>.log`."""
        logs = self.state / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        log = logs / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **environment, MARK: str(self.state)},
                cwd=self.state,
                start_new_session=True,
            )
        part = Part(name, process, log, argv, environment)
        self.parts[name] = part
        self._write()
        return part

    def restart(self, name: str) -> Part:
        """Start a part again with the arguments that it had."""
        old = self.parts[name]
        return self.start(name, old.argv, old.environment)

    def wait_for(self, name: str, what: str, ready: Callable[[], bool], seconds: float = 30.0) -> None:
        """Poll until `ready()`; fails at once when the process ends.

        Raises:
            DemoFailed: It ended, or was not ready in time.
        """
        part = self.parts[name]
        deadline = time.monotonic() + seconds
        while not ready():
            if part.process.poll() is not None:
                code = part.process.returncode
                raise DemoFailed(f"{name} ended with code {code} before it was {what}:\n{tail(part.log)}")
            if time.monotonic() > deadline:
                raise DemoFailed(f"{name} was not {what} after {seconds:.0f} s:\n{tail(part.log)}")
            time.sleep(0.05)

    def kill(self, name: str) -> int:
        """End it with SIGKILL, as a crash would. Returns the exit code: -9, unless it had ended before."""
        self.parts[name].process.kill()
        return self.parts[name].process.wait()

    def stop(self, name: str, seconds: float) -> int:
        """SIGTERM, wait, SIGKILL. Returns the exit code."""
        process = self.parts[name].process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                print(f"{name} did not end within {seconds:.0f} s and is killed", file=sys.stderr)
                process.kill()
                process.wait()
        return process.returncode

    def _write(self) -> None:
        rows = []
        for part in self.parts.values():
            try:
                rows.append([part.process.pid, psutil.Process(part.process.pid).create_time()])
            except psutil.NoSuchProcess:
                continue
        (self.state / "processes.json").write_text(json.dumps(rows))


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def marked(state: Path) -> list[psutil.Process]:
    """Every live process that carries this run's mark (guests have an empty environment: see `leftovers`)."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(state) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


def end_all(state: Path, seconds: float = 10.0) -> int:
    """End what a run left behind: SIGTERM, then SIGKILL. Returns how many there were."""
    left = marked(state)
    for process in left:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(left, timeout=seconds)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)
    return len(left)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
