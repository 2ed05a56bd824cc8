"""`make hosts-demo`: two VMMs of different size behind one validator; one is killed in the middle.

Every job ends all the same, on the host that is left; when the other is back, what is on it is destroyed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.interrupts import run_command
from examples.demo.leftovers import left, look
from examples.demo.processes import DemoFailed
from examples.demo.repositories import make_repository
from examples.demo.run_folder import RunFolder
from examples.demo.stack import Stack, make_stack, rows
from examples.demo.vmm_part import VmmPart
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 240.0
_FINISHED = frozenset({"completed", "failed", "cancelled"})
_TOML = """\
name = "sleeper"
version = "1"
[cvm]
cpu_cores = 1
memory_mb = 256
disk_mb = 512
"""
_CODE = '''\
"""A challenge whose jobs take as long as they are told."""

import time

from platform_challenge_sdk import Context, challenge


@challenge.on_job()
def sleep(ctx: Context, payload: dict) -> dict:
    """Sleep, and score."""
    time.sleep(payload["seconds"])
    return {"score": 1.0}
'''


@dataclass(slots=True)
class HostsDemo:
    """One run."""

    stack: Stack
    big: VmmPart
    small: VmmPart
    console: Console
    jobs: int
    seconds: float
    began: float = field(default_factory=time.monotonic)
    figures: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Start, queue, kill, wait for every end, bring back, drain, count.

        Raises:
            DemoFailed: Something did not come about in time.
        """
        stack = self.stack
        before = look(stack.state)
        stack.start_api()
        for vmm in (self.big, self.small):
            vmm.start(stack.processes, stack.validator.guest_port)
        self._configure()
        stack.start_validator()
        challenge_id = self._challenge()
        for _ in range(self.jobs):
            stack.add_job(challenge_id, {"seconds": self.seconds}, 120)
        self._until("jobs run on both hosts", lambda: self._running() == {"big", "small"})
        self._until("a job has ended", lambda: self._ended() >= 1)
        self._kill_and_bring_back()
        self._until("every job has ended", lambda: self._ended() == self.jobs)
        self._until("nothing is left on its way out", lambda: "destroying" not in self._stages())
        code = stack.processes.stop("validator", 90)
        vms_left = len(self.big.vms()) + len(self.small.vms())
        names = (self.big.name, self.small.name, "platform-api")
        codes = {"validator": code} | {name: stack.processes.stop(name, 15) for name in names}
        found = left(before, look(stack.state))
        return self._report(vms_left, found, codes)

    def _kill_and_bring_back(self) -> None:
        stack, killed_at = self.stack, time.monotonic()
        self.console.print(f"killing the big host's VMM with {len(self.big.vms())} VMs on it: kill -9")
        stack.processes.kill(self.big.name)
        self._until("the big host is cordoned", lambda: self._host("big")["state"] == "cordoned")
        self.figures["cordoned_after_s"] = round(time.monotonic() - killed_at, 1)
        self.console.print(f"cordoned: {self._host('big')['why']}", soft_wrap=True, highlight=False)
        before = self._ended()
        self._until("jobs go on elsewhere", lambda: self._ended() > before or self._ended() == self.jobs)
        self._until("nothing runs on it any more", lambda: not self._jobs_on("big"))
        self.figures["released_after_s"] = round(time.monotonic() - killed_at, 1)
        self.figures["ended_while_it_was_down"] = self._ended() - before
        back_at = time.monotonic()
        self.big.restart(stack.processes)
        self._until("the big host is open", lambda: self._host("big")["state"] == "open")
        self.figures["open_after_s"] = round(time.monotonic() - back_at, 1)

    def _configure(self) -> None:
        part = self.stack.validator
        part.folder.mkdir(mode=0o700)
        tables = [vmm.table() for vmm in (self.big, self.small)]
        part.config.write_text(
            "\n".join(
                [
                    '[sandbox_config]\nisolation_level = "Container"',
                    '[sources]\nallow = ["https", "file"]',
                    "[resource_limits]\ncpu_cores = 6\nmemory_mb = 4096\ndisk_mb = 20480",
                    "[jobs]\nmax_concurrent = 6",
                    *tables,
                ]
            )
        )

    def _challenge(self) -> str:
        tree = self.stack.state / "sleeper"
        tree.mkdir()
        (tree / "platform.toml").write_text(_TOML)
        (tree / "challenge.py").write_text(_CODE)
        repository = self.stack.state / "repositories" / "sleeper"
        commit = make_repository(tree, repository)
        return self.stack.add_challenge("sleeper", repository, commit, timeout_s=120, memory_mb=256)

    # What is seen

    def _status(self) -> dict[str, Any]:
        return self.stack.status() or {"hosts": [], "cvms": [], "active_jobs": []}

    def _host(self, name: str) -> dict[str, Any]:
        return next((one for one in self._status()["hosts"] if one["name"] == name), {"state": "unknown"})

    def _stages(self) -> set[str]:
        return {cvm["stage"] for cvm in self._status()["cvms"]}

    def _jobs_on(self, host: str) -> list[str]:
        found = self._status()
        there = {cvm["name"] for cvm in found["cvms"] if cvm["host"] == host}
        return [job["job_id"] for job in found["active_jobs"] if job["vm"] in there]

    def _running(self) -> set[str]:
        return {name for name in ("big", "small") if self._jobs_on(name)}

    def _ended(self) -> int:
        return sum(job["status"] in _FINISHED for job in self.stack.jobs())

    def _until(self, what: str, holds: Callable[[], bool]) -> None:
        while not holds():
            if time.monotonic() - self.began > _PATIENCE:
                raise DemoFailed(f"not after {_PATIENCE:.0f} s: {what}")
            time.sleep(0.1)
        self.console.print(f"{time.monotonic() - self.began:6.1f} s  {what}", highlight=False)

    def _report(self, vms_left: int, found: dict[str, list[str]], codes: dict[str, int]) -> dict[str, Any]:
        jobs = self.stack.jobs()
        outcomes = Counter(job["outcome"] for job in jobs)
        database = self.stack.validator.database
        hosts = Counter(row["host"] for row in rows(database, "SELECT host FROM cvms_journal"))
        endings = Counter(row["outcome"] for row in rows(database, "SELECT outcome FROM jobs_journal"))
        return {
            "jobs": len(jobs),
            "succeeded": outcomes["succeeded"],
            "attempts": sum(job["attempt"] for job in jobs),
            "tried_again": sum(job["attempt"] > 1 for job in jobs),
            "released_as_infra": endings["infra_error"],
            "blamed_on_submissions": endings["sandbox_died"] + endings["failed"] + endings["timeout"],
            "cvms_made": {"big": hosts["big"], "small": hosts["small"]},
            **self.figures,
            "cvms_not_gone": len(rows(database, "SELECT 1 FROM cvms_journal WHERE phase <> 'gone'")),
            "vms_left": vms_left,
            "left": {kind: len(names) for kind, names in found.items()},
            "exit_codes": {name: code for name, code in codes.items() if code},
            "wall_s": round(time.monotonic() - self.began, 1),
        }


def faults_of(report: dict[str, Any]) -> list[str]:
    """What does not hold."""
    expected = {
        "succeeded": report["jobs"],
        "blamed_on_submissions": 0,
        "cvms_not_gone": 0,
        "vms_left": 0,
        "left": {},
        "exit_codes": {},
    }
    wrong = [key for key, want in expected.items() if report[key] != want]
    faults = [f"{key}: expected {expected[key]}, got {report[key]}" for key in wrong]
    if report["tried_again"] < 1:
        faults.append("no job was on the host that was killed")
    return faults


def main() -> int:
    """Run it. Returns the exit code: 0 only if every expectation held."""
    parser = argparse.ArgumentParser(prog="make hosts-demo", description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer and shorter jobs")
    parser.add_argument("--output", type=Path, default=ROOT / ".demo" / "hosts", metavar="DIR")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    folder = RunFolder(arguments.output, "platform-hosts-")
    state = folder.begin(console)
    stack = make_stack(state)
    big = VmmPart("vmm-big", "big", state, {"cpu_cores": 4, "max_cvms": 4})
    small = VmmPart("vmm-small", "small", state, {"cpu_cores": 2, "memory_mb": 512, "max_cvms": 2})
    jobs, seconds = (8, 3.0) if arguments.short else (24, 6.0)
    try:
        report = HostsDemo(stack, big, small, console, jobs, seconds).run()
    except DemoFailed as error:
        console.print(f"[red]hosts-demo: {error}[/]", soft_wrap=True, highlight=False)
        return 1
    finally:
        for name in ("validator", big.name, small.name, "platform-api"):
            if name in stack.processes.parts:
                stack.processes.stop(name, 15)
        folder.end()
    faults = faults_of(report)
    for fault in faults:
        console.print(f"[red]does not hold:[/] {fault}", soft_wrap=True)
    print(json.dumps(report))
    return int(bool(faults))


if __name__ == "__main__":
    run_command(main)
