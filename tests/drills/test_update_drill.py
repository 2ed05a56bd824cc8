"""Updates without downtime, with real processes, in short; and the figures are not blind."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.drills.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "a" * 40, "b" * 40


@pytest.mark.slow(reason="starts the whole system in both modes, with a CVM for each of its jobs in one")
@pytest.mark.timeout(600)
def test_updates_lose_nothing_and_leave_no_gap_in_both_modes() -> None:
    """Three commits, one broken at import, while jobs flow."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.drills.updates", "--jobs", "10"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    figures = {key: report[key] for key in ("jobs", "wrong_commit", "lost", "gap_ms", "old_left", "left")}
    assert figures == {"jobs": 10, "wrong_commit": 0, "lost": 0, "gap_ms": 0, "old_left": 0, "left": 0}
    assert report["import_error_shown"]
    per_job, shared = (json.loads(line) for line in done.stdout.splitlines()[-3:-1])
    assert per_job["cvms_with_jobs"] == 10, "each job has a CVM of its own"
    assert shared["cvms_with_jobs"] == 2, "one CVM for each version that served"
    assert all(count > 0 for count in per_job["by_commit"][::2] + shared["by_commit"][::2])


def at(second: float) -> str:
    """A moment as the journal writes it."""
    return f"2026-01-01T00:00:{second:09.6f}Z"


def event(second: float, commit: str, state: str, reason: str | None = None) -> dict[str, Any]:
    """A row of the history."""
    return {"at": at(second), "key": commit, "commit_id": commit, "state": state, "reason": reason}


def claim(commit: str, ended: float) -> dict[str, Any]:
    """A row of the jobs."""
    key = f"id:{commit}:digest"
    return {"job_id": f"job-{commit[0]}", "attempt": 1, "instance_key": key, "ended_at": at(ended)}


def test_time_without_an_active_instance_is_counted() -> None:
    """Also while one is Active and takes no jobs, and at the end until the last job."""
    history = [
        event(1, OLD, "Active"),
        event(5, OLD, "Active", "drained first: no room"),
        event(7, NEW, "Active"),
        event(7, OLD, "Recycling"),
        event(10, NEW, "Failed", "its CVM ended"),
    ]
    assert Ledger([], [], history[:1]).gap() == timedelta(0)
    assert Ledger([claim(NEW, 13)], [], history).gap() == timedelta(seconds=2 + 3)


def test_a_result_of_another_commit_or_of_other_code_is_counted() -> None:
    """The commit is compared with the claim's, and with what the code says that it is."""
    versions = {1.0: OLD, 3.0: NEW}

    def wrong(commit: str, score: float) -> int:
        result = json.dumps({"attempt": 1, "github_commit": commit, "score": score})
        return Ledger([claim(OLD, 1)], [], []).wrong_commits([{"id": "job-a", "result": result}], versions)

    assert [wrong(OLD, 1.0), wrong(NEW, 3.0), wrong(OLD, 3.0), wrong(NEW, 1.0)] == [0, 1, 1, 1]


@pytest.mark.parametrize(("gone", "left"), [(19.0, 0), (21.0, 1), (None, 1)])
def test_a_cvm_that_outlives_its_last_job_by_more_than_ten_seconds_is_counted(
    gone: float | None, left: int
) -> None:
    """Counted from the last job's end, or from the switch where that came later."""
    cvm = {"instance_key": f"id:{OLD}:digest", "gone_at": None if gone is None else at(gone)}
    assert Ledger([claim(OLD, 10)], [cvm], [event(8, OLD, "Recycling")]).left_of(OLD) == left
