"""Increments from several CVMs add up exactly, although the validator is killed in the middle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow(reason="starts the whole system, three CVMs, and the validator twice")
@pytest.mark.timeout(300)
def test_increments_from_cvms_add_up_across_a_kill_9_of_the_validator() -> None:
    """The sum, what the challenges were answered, and what was asked are one number; nothing is left."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.drills.values", "--cvms", "3", "--increments", "1500"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["total"] == report["answered"] == report["increments"] == 1500
    assert 0 < report["applied_at_kill"] < 1500
    assert (report["unfinished"], report["left"]) == (0, 0)
