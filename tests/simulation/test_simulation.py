"""The real daemon under seeded faults on a virtual clock keeps its promises; and a broken one is caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulation.bugs import BUGS, FIVE
from tests.simulation.faults import FAULTS

from platform_validator.crashpoint import POINTS

ROOT = Path(__file__).parents[2]

_CAUGHT_BY = {
    "stored-after-submit": "I2",
    "released-twice": "I10",
    "silence-taken-for-yes": "lease",
    "push-trusted": "I5",
    "owned-by-prefix": "I3",
    "stale-token-taken": "I1",
    "never-renewed": "I4",
    "silence-taken-for-no": "I6",
    "slot-until-destroyed": "I7",
    "old-version-first": "I8",
    "death-scored": "I9",
    "sent-once": "liveness",
}
"""The law that each breaks."""
_CALM = 11
"""A seed in which nothing goes wrong, so that I4 can be told."""

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
        timeout=500,
    )


@pytest.mark.robustness(1, "each-point")
@pytest.mark.slow(reason="fifty worlds")
@pytest.mark.timeout(600)
def test_fifty_seeds_break_no_law() -> None:
    """I1 to I10 hold at every step, every job ends once the faults stop, and each kind of fault struck."""
    ran = _simulate("--seeds", "50", "--processes", "2")
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["violations"] == 0, ran.stderr[-4000:]
    assert ran.returncode == 0
    assert figures["jobs"] == 5050
    assert sum(figures["outcomes"].values()) == 5050
    assert figures["crashes"] >= 50, "the plan must do some harm"
    assert figures["adopted"] >= 5
    assert figures["crashpoints"] >= len(POINTS) // 2
    assert set(figures["faults"]) == set(FAULTS)
    assert [kind for kind, strikes in figures["faults"].items() if not strikes] == []


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


def test_a_seed_that_fails_replays_exactly() -> None:
    """The broken law too, at the same moment."""
    first, again = (_simulate("--bug", "push-trusted", "--seed", "3") for _ in range(2))
    assert first.returncode == again.returncode == 1
    assert first.stdout == again.stdout
    assert first.stderr == again.stderr
    assert " I5: " in first.stderr


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_the_proof_is_proved(bug: str) -> None:
    """A validator with this fault put in is caught within ten seeds, by the law that it breaks."""
    law = _CAUGHT_BY[bug]
    first = _CALM if law == "I4" else 0
    ran = _simulate("--bug", bug, "--until", law, "--seeds", "10", "--first", str(first), "--processes", "1")
    assert ran.returncode == 1
    assert json.loads(ran.stdout.splitlines()[-1])["broken"][law] > 0
    assert f"{law}: " in ran.stderr


def test_every_law_is_broken_by_some_bug() -> None:
    """The five that the proof is proved by, and one for each law that none of them breaks."""
    assert set(_CAUGHT_BY) == set(BUGS)
    assert set(FIVE) <= set(BUGS)
    laws = {"lease", "liveness", *(f"I{number}" for number in range(1, 11))}
    assert set(_CAUGHT_BY.values()) == laws
