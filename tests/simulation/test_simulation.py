"""The real daemon under seeded faults on a virtual clock keeps its promises; and a broken one is caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulation.bugs import BUGS

from platform_validator.crashpoint import POINTS

ROOT = Path(__file__).parents[2]

_CAUGHT_BY = {
    "stored-after-submit": "I2",
    "released-twice": "I10",
    "silence-taken-for-yes": "lease",
    "push-trusted": "I5",
    "owned-by-prefix": "I3",
}

_ONCE_FAILED = (7, 61, 66, 135, 336, 552, 616)
"""Seeds that found faults: ends lost on a full disk, late CVMs, and jobs timed out that had just begun."""


def _simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose sets have the order that a replay has."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_fifty_seeds_break_no_law(first: int) -> None:
    """I1 to I10 hold at every step, and every job comes to an end once the faults stop."""
    ran = _simulate("--seeds", "10", "--first", str(first), "--processes", "1")
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["violations"] == 0, ran.stderr[-4000:]
    assert ran.returncode == 0
    assert figures["jobs"] == 1040
    assert sum(figures["outcomes"].values()) == 1040
    assert figures["crashes"] >= 10, "the plan must do some harm"
    assert figures["adopted"] >= 1


@pytest.mark.parametrize("seed", _ONCE_FAILED)
def test_a_seed_that_once_failed_holds(seed: int) -> None:
    """Kept, so that what it found does not come back."""
    ran = _simulate("--seeds", "1", "--first", str(seed), "--processes", "1")
    assert ran.returncode == 0, ran.stderr[-4000:]


def test_a_seed_replays_exactly() -> None:
    """Event for event, in another process; another seed gives another world."""
    first, again, other = (_simulate("--seed", seed) for seed in ("11", "11", "12"))
    assert first.stdout == again.stdout
    assert len(first.stdout.splitlines()) > 100
    assert first.stdout != other.stdout


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_the_proof_is_proved(bug: str) -> None:
    """A validator with this fault put in is caught within ten seeds, by the law that it breaks."""
    ran = _simulate("--bug", bug, "--seeds", "10", "--processes", "1")
    assert ran.returncode == 1
    assert json.loads(ran.stdout.splitlines()[-1])["violations"] > 0
    assert f" {_CAUGHT_BY[bug]}: " in ran.stderr


def test_crashes_strike_at_the_points_of_a_job_s_life() -> None:
    """Ten seeds alone see most of the crashpoints; the others are rarer than that."""
    ran = _simulate("--seeds", "10", "--first", "50", "--processes", "1")
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["crashpoints"] > len(POINTS) // 3
