"""`make values-drill`: CVMs that increment one value at once, and a validator that is killed meanwhile.

The last line of stdout is one JSON object; its `total` is what the validator's journal holds at the end, and
`answered` what the Platform API's database says that the challenges were answered.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from examples.demo.interrupts import run_command
from examples.demo.leftovers import left, look
from examples.demo.processes import DemoFailed, end_all
from examples.demo.repositories import make_repository
from examples.demo.stack import Stack, make_stack

TREE = Path(__file__).parent / "counter"
_PATIENCE = 300.0
_LOOK_EVERY = 0.05
_TIMEOUT = 10.0


def main() -> int:
    """Run the drill. Returns 0 only if the sum is exact and nothing is left."""
    parser = argparse.ArgumentParser(prog="make values-drill", description=__doc__)
    parser.add_argument("--cvms", type=int, default=20)
    parser.add_argument("--increments", type=int, default=10_000, help="all CVMs together")
    arguments = parser.parse_args()
    state = Path(tempfile.mkdtemp(prefix="platform-drill-"))
    state.chmod(0o711)
    before = look(state)
    stack = make_stack(state)
    stack.validator_environment = {
        "VALIDATOR_CPU_CORES": str(arguments.cvms),
        "VALIDATOR_MEMORY_MB": str(arguments.cvms * 192),
        "VALIDATOR_DISK_MB": str(arguments.cvms * 1024),
        "VALIDATOR_MAX_CONCURRENT_JOBS": str(arguments.cvms),
    }
    stack.validator.write()
    with stack.validator.config.open("a") as config:
        config.write(f"[resource_limits]\nmax_cvms = {arguments.cvms}\n")
    began = time.monotonic()
    try:
        report = Drill(stack, arguments.cvms, arguments.increments // arguments.cvms).run()
    except DemoFailed as error:
        print(f"drill: {error}", file=sys.stderr)
        return 1
    finally:
        stack.stop()
        end_all(state)
        remains = left(before, look(state))
        shutil.rmtree(state, ignore_errors=True)
    report |= {
        "left": sum(len(found) for found in remains.values()),
        "wall_s": round(time.monotonic() - began, 1),
    }
    print(json.dumps(report))
    exact = report["total"] == report["increments"] == report["answered"]
    return 0 if exact and not report["unfinished"] and not report["left"] else 1


class Drill:
    """One run: every CVM increments; the validator dies when all of them run."""

    def __init__(self, stack: Stack, cvms: int, times: int) -> None:
        self._stack = stack
        self._cvms = cvms
        self._times = times
        self._challenge = ""
        self._said = 0.0

    def run(self) -> dict[str, Any]:
        """The whole of it; returns what was counted."""
        stack = self._stack
        stack.start()
        repository = stack.state / "repositories" / "counter"
        commit = make_repository(TREE, repository)
        self._challenge = stack.add_challenge("counter", repository, commit, 600, memory_mb=192)
        for _ in range(self._cvms):
            stack.add_job(self._challenge, {"times": self._times}, 600)
        self._until("all run", lambda: self._running() == self._cvms)
        stack.validator_command("values", "set", self._challenge, "go", "true")
        self._until("a third is counted", lambda: 3 * self._replies() > self._cvms * self._times)
        stack.kill_validator()
        at_kill = self._replies()
        stack.restart_validator()
        self._until("all have ended", lambda: self._finished() == self._cvms)
        jobs = stack.jobs()
        return {
            "increments": self._cvms * self._times,
            "total": self._counted(),
            "answered": int(sum(job["score"] or 0 for job in jobs)),
            "cvms": self._cvms,
            "kills": 1,
            "applied_at_kill": at_kill,
            "attempts": sum(job["attempt"] for job in jobs),
            "unfinished": sum(job["status"] != "completed" for job in jobs),
        }

    def _running(self) -> int:
        status = self._stack.status() or {}
        return sum(job["stage"] == "running" for job in status.get("active_jobs", []))

    def _finished(self) -> int:
        return sum(job["status"] in ("completed", "failed", "cancelled") for job in self._stack.jobs())

    def _replies(self) -> int:
        """Requests that were applied, by the journal."""
        path = self._stack.state / "validator" / "validator.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_TIMEOUT)) as journal:
            return int(journal.execute("SELECT count(*) FROM values_replies").fetchone()[0])

    def _counted(self) -> int:
        done = self._stack.validator_command("values", "get", self._challenge, "total", "--json")
        return int(json.loads(done.stdout)["value"]) if done.returncode == 0 else 0

    def _until(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not holds():
            if time.monotonic() > deadline:
                raise DemoFailed(f"not so that {what} after {_PATIENCE:.0f} s: see {self._stack.state}")
            if time.monotonic() - self._said > 1:
                self._said = time.monotonic()
                doing = f"{self._running()} run, {self._replies()} applied"
                progress = f"{doing}, {self._finished()} of {self._cvms} ended"
                print(f"drill: until {what}: {progress}", file=sys.stderr, flush=True)
            time.sleep(_LOOK_EVERY)


if __name__ == "__main__":
    run_command(main)
