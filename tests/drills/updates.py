"""`make update-drill`: three commits while jobs flow (good, broken at import, good), in both modes of `cvm`.

The last line of stdout is one JSON object. `jobs` is how many flowed in each mode; the other figures are
sums over both: `wrong_commit` results whose commit, or whose code, is not the one that their job was
claimed for; `lost` jobs without a result; `gap_ms` the time without an Active instance, by the journal;
`old_left` CVMs of an older commit that were not gone ten seconds after its last job.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.demo.interrupts import run_command
from examples.demo.leftovers import left, look
from examples.demo.processes import DemoFailed, end_all
from examples.demo.repositories import commit_all, make_repository
from examples.demo.stack import Stack, make_stack
from tests.drills.ledger import Ledger

TREE = Path(__file__).parent / "versions"
MODES = {"per_job": 1, "shared": 3}
"""The modes of `cvm`, and how many jobs run at once in one CVM."""
BROKEN = "import module_that_is_not_there"
_LIMITS = {
    "VALIDATOR_CPU_CORES": "10",
    "VALIDATOR_MEMORY_MB": "2048",
    "VALIDATOR_DISK_MB": "10240",
    "VALIDATOR_MAX_CONCURRENT_JOBS": "3",
}
_PATIENCE = 480.0
_LOOK_EVERY = 0.1
_QUEUED = 6
_SECONDS = 0.2


def main() -> int:
    """Run the drill. Returns 0 only if nothing was wrong, lost or left, and there was no gap."""
    parser = argparse.ArgumentParser(prog="make update-drill", description=__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="in each mode")
    parser.add_argument("--mode", choices=sorted(MODES), action="append", help="default: both")
    arguments = parser.parse_args()
    began = time.monotonic()
    modes = arguments.mode or list(MODES)
    reports = []
    for mode in modes:
        try:
            report = _in_a_stack(mode, arguments.jobs)
        except DemoFailed as error:
            print(f"drill: {error}", file=sys.stderr)
            return 1
        print(json.dumps(report), flush=True)
        reports.append(report)
    counted = ("wrong_commit", "lost", "gap_ms", "old_left", "left")
    total = {"jobs": arguments.jobs} | {key: sum(report[key] for report in reports) for key in counted}
    total |= {
        "import_error_shown": all(report["import_error_shown"] for report in reports),
        "modes": modes,
        "wall_s": round(time.monotonic() - began, 1),
    }
    print(json.dumps(total))
    return int(any(total[key] for key in counted) or not total["import_error_shown"])


def _in_a_stack(mode: str, jobs: int) -> dict[str, Any]:
    state = Path(tempfile.mkdtemp(prefix="platform-drill-"))
    state.chmod(0o711)
    before = look(state)
    stack = make_stack(state)
    stack.validator_environment = dict(_LIMITS)
    began = time.monotonic()
    try:
        drill = Drill(stack, mode, jobs)
        drill.run()
        stack.processes.stop("validator", 90)
        report = drill.report()
    finally:
        stack.stop()
        end_all(state)
        remains = left(before, look(state))
        shutil.rmtree(state, ignore_errors=True)
    report["left"] = sum(len(found) for found in remains.values())
    report["wall_s"] = round(time.monotonic() - began, 1)
    return report


class Drill:
    """One run in one mode."""

    def __init__(self, stack: Stack, mode: str, jobs: int) -> None:
        self._stack = stack
        self._mode = mode
        self._jobs = jobs
        self._repository = stack.state / "repositories" / "versions"
        self._commits: list[str] = []
        self._challenge = ""
        self._queued = 0
        self._said = 0.0

    def run(self) -> None:
        """A good commit, a broken one, a good one; jobs flow before, between and after."""
        stack, jobs = self._stack, self._jobs
        stack.start()
        make_repository(TREE, self._repository)
        self._commit("VERSION = 1")
        self._challenge = stack.add_challenge(
            "versions", self._repository, self._commits[0], 60, memory_mb=192
        )
        self._flow(
            "the first commit serves", jobs // 4, lambda: self._serves(0) and self._ended() > jobs // 10
        )
        self._commit(f"{BROKEN}\nVERSION = 2")
        stack.update_challenge(self._challenge, self._commits[1])
        self._flow("the broken commit is Failed beside it", jobs // 2, self._second_failed)
        self._commit("VERSION = 3")
        stack.update_challenge(self._challenge, self._commits[2])
        self._flow("the third commit serves", jobs - jobs // 8, lambda: self._serves(2))
        self._flow("every job has ended", jobs, lambda: self._ended() == jobs)
        self._flow("nothing old is shown", jobs, self._alone)

    def report(self) -> dict[str, Any]:
        """What the journal and the Platform API's database say."""
        ledger = Ledger.read(self._stack.state / "validator" / "validator.db", self._challenge)
        jobs = self._stack.jobs()
        versions = dict(zip((1.0, 2.0, 3.0), self._commits, strict=True))
        failures = ledger.failures_of(self._commits[1])
        results = [json.loads(job["result"]) for job in jobs if job["result"]]
        return {
            "mode": self._mode,
            "jobs": len(jobs),
            "wrong_commit": ledger.wrong_commits(jobs, versions),
            "lost": sum(job["status"] != "completed" for job in jobs),
            "gap_ms": round(ledger.gap().total_seconds() * 1000),
            "old_left": sum(ledger.left_of(commit) for commit in self._commits[:2]),
            "import_error_shown": any(BROKEN.split()[1] in why for why in failures),
            "by_commit": [sum(one["github_commit"] == commit for one in results) for commit in self._commits],
            "attempts": sum(job["attempt"] for job in jobs),
            "cvms": len(ledger.cvms),
            "cvms_with_jobs": len({row["vm"] for row in ledger.claims if row["vm"]}),
        }

    def _commit(self, code: str) -> None:
        challenge, spec = self._repository / "challenge.py", self._repository / "platform.toml"
        number = len(self._commits) + 1
        told = (TREE / "challenge.py").read_text().replace("VERSION = 1", code)
        challenge.write_text(f"{told}\n# commit {number}\n")
        text = (TREE / "platform.toml").read_text().replace('"per_job"', f'"{self._mode}"')
        spec.write_text(text.replace("concurrency = 1", f"concurrency = {MODES[self._mode]}"))
        self._commits.append(commit_all(self._repository, f"version {number}"))

    def _flow(self, what: str, most: int, holds: Callable[[], bool]) -> None:
        """Keep jobs pending, at most so many in all, until something holds."""
        deadline = time.monotonic() + _PATIENCE
        while not holds():
            now, ended = time.monotonic(), self._ended()
            if now > deadline:
                raise DemoFailed(f"not so that {what} after {_PATIENCE:.0f} s: see {self._stack.state}")
            while self._queued < min(most, ended + _QUEUED):
                self._stack.add_job(self._challenge, {"seconds": _SECONDS}, 60)
                self._queued += 1
            if now - self._said > 1:
                self._said = now
                told = f"{ended} of {self._jobs} jobs ended; {self._shown()}"
                print(f"drill: {self._mode}: until {what}: {told}", file=sys.stderr, flush=True)
            time.sleep(_LOOK_EVERY)

    def _ended(self) -> int:
        return sum(job["status"] in ("completed", "failed", "cancelled") for job in self._stack.jobs())

    def _view(self) -> dict[str, Any]:
        return next(iter((self._stack.status() or {}).get("challenges", [])), {})

    def _serves(self, number: int) -> bool:
        serving = self._view().get("serving") or {}
        return serving.get("state") == "Active" and serving.get("commit") == self._commits[number]

    def _flows(self) -> bool:
        return self._serves(0) and self._ended() > self._jobs // 10

    def _second_failed(self) -> bool:
        candidate = self._view().get("candidate") or {}
        failed = candidate.get("state") == "Failed" and candidate.get("commit") == self._commits[1]
        return failed and self._serves(0)

    def _alone(self) -> bool:
        view = self._view()
        return self._serves(2) and not view.get("old") and view.get("candidate") is None

    def _shown(self) -> str:
        view = self._view()
        shown = [
            f"{each['state']} {each['commit'][:8]}"
            for each in (view.get("serving"), view.get("candidate"), *view.get("old", ()))
            if each
        ]
        return ", ".join(shown) or "no instance yet"


if __name__ == "__main__":
    run_command(main)
