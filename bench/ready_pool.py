"""From a job's claim to the first line of its handler: booted for it, from the ready pool, in a shared CVM.

The whole system runs as separate processes. A claim counts from the journal's note of the Platform API's
answer; the handler's first line reads the clock, and its result brings that time back: one machine's clock.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import datetime
from pathlib import Path

from examples.demo.interrupts import run_command
from examples.demo.processes import DemoFailed, end_all
from examples.demo.repositories import make_repository
from examples.demo.stack import Stack, make_stack

CHALLENGE = '''"""Tells when it began."""

import time
from typing import Any

from platform_challenge_sdk import Context, challenge, run


@challenge.on_job()
def job(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    began = time.time()
    return {"score": 1.0, "metrics": {"began": began}}


run()
'''
SPEC = """name = "{name}"
version = "1"

[cvm]
cpu_cores = 1
memory_mb = 192
disk_mb = 256

[execution]
cvm = "{mode}"
ready = {ready}
"""
KINDS = {
    "booted for the job": ("cold", "per_job", 0),
    "from the ready pool": ("ready", "per_job", 1),
    "shared CVM": ("shared", "shared", 1),
}
_PATIENCE = 120.0
_TIMEOUT = 10.0


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20, help="of each kind, one after the other")
    jobs: int = parser.parse_args().jobs
    state = Path(tempfile.mkdtemp(prefix="platform-bench-"))
    state.chmod(0o711)
    stack = make_stack(state)
    stack.validator_environment = {"VALIDATOR_MEMORY_MB": "2048", "VALIDATOR_CPU_CORES": "8"}
    try:
        stack.start()
        found = {kind: _measure(stack, *recipe, jobs) for kind, recipe in KINDS.items()}
    except DemoFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        stack.stop()
        end_all(state)
        shutil.rmtree(state, ignore_errors=True)
    print(f"{'claim to first line':<28}{'p50 ms':>9}{'p99 ms':>9}{'min':>9}{'max':>9}")
    report: dict[str, float] = {"jobs": jobs}
    for kind, values in found.items():
        p50, p99 = statistics.median(values), _p99(values)
        shown = (p50, p99, min(values), max(values))
        print(f"{kind:<28}" + "".join(f"{value * 1000:>9.0f}" for value in shown))
        name = KINDS[kind][0]
        report |= {f"{name}_ms_p50": round(p50 * 1000, 1), f"{name}_ms_p99": round(p99 * 1000, 1)}
    print(json.dumps(report))
    return 0


def _measure(stack: Stack, name: str, mode: str, ready: int, jobs: int) -> list[float]:
    tree, repository = stack.state / "trees" / name, stack.state / "repositories" / name
    tree.mkdir(parents=True)
    (tree / "challenge.py").write_text(CHALLENGE)
    (tree / "platform.toml").write_text(SPEC.format(name=name, mode=mode, ready=ready))
    challenge = stack.add_challenge(name, repository, make_repository(tree, repository), 60, memory_mb=192)
    mine = []
    for _ in range(jobs):
        _until(f"{name} stands ready", lambda: _stands_ready(stack, challenge, ready))
        mine.append(stack.add_job(challenge, {}, 60))
        _until(f"{name} has run", lambda: _ended(stack, mine[-1]))
    return _latencies(stack, mine)


def _stands_ready(stack: Stack, challenge: str, ready: int) -> bool:
    status = stack.status() or {}
    shown = {each["id"]: each.get("serving") or {} for each in status.get("challenges", [])}
    serving = shown.get(challenge, {})
    return serving.get("state") == "Active" and serving.get("ready", 0) >= ready


def _ended(stack: Stack, job_id: str) -> bool:
    return any(job["id"] == job_id and job["status"] == "completed" for job in stack.jobs())


def _latencies(stack: Stack, mine: list[str]) -> list[float]:
    began = {
        job["id"]: json.loads(job["result"])["metrics"]["began"] for job in stack.jobs() if job["id"] in mine
    }
    journal = stack.state / "validator" / "validator.db"
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True, timeout=_TIMEOUT)) as connection:
        rows = connection.execute("SELECT job_id, started_at FROM jobs_journal").fetchall()
    claimed = {job_id: datetime.fromisoformat(at).timestamp() for job_id, at in rows if at}
    return [began[job_id] - claimed[job_id] for job_id in mine]


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def _until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise DemoFailed(f"not so that {what} after {_PATIENCE:.0f} s")
        time.sleep(0.02)


if __name__ == "__main__":
    run_command(main)
