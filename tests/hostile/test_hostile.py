"""Hostile submissions and challenges on a running system, some of each kind; `make hostile` has all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hostile.attack import Attack, Facts, Guest
from tests.hostile.catalogue import ATTACKS, SHORT
from tests.hostile.run import Verdict

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow(reason="two whole systems, a CVM for each attack and one for its control")
@pytest.mark.timeout(900)
@pytest.mark.needs("root", why="what an attack does in its sandbox is seen from outside")
@pytest.mark.robustness(22, "sparse-file", "double-fork", "ptrace")
@pytest.mark.robustness(23, "metadata", "validator-listener")
@pytest.mark.robustness(24, "secret-in-pieces", "forged-line")
@pytest.mark.robustness(25, "only-inside")
@pytest.mark.robustness(26, "artifact-path")
@pytest.mark.robustness(27, "links")
@pytest.mark.robustness(28, "hotkey")
def test_attacks_are_contained_and_their_controls_are_not(tmp_path: Path) -> None:
    """Each succeeds where its one guard is widened; nobody else suffers, nothing leaks, nothing is left."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", "--short", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["attacks"] == figures["contained"] == figures["controls_live"] == len(SHORT)
    zero = ("canary_leaks", "host_changes", "validator_restarts", "other_jobs_failed")
    assert [figures[name] for name in zero] == [0, 0, 0, 0]
    assert figures["other_jobs"] > 0


def test_there_are_attacks_enough_and_each_case_has_some() -> None:
    """Names are found once: a row of the display is one attack."""
    assert len(ATTACKS) >= 45
    assert len({each.name for each in ATTACKS}) == len(ATTACKS)
    assert {each.case for each in ATTACKS} == set(range(22, 29))
    assert {each.case for each in ATTACKS if each.name in SHORT} == set(range(22, 29))
    assert set(SHORT) <= {each.name for each in ATTACKS}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_nothing_that_happened_is_no_success(attack: Attack) -> None:
    """A job that never ran is neither contained nor a live control."""
    verdict = Verdict(attack, Facts(), Facts(), attack.won(Facts(outcome="failed")), 0.0)
    assert not verdict.contained


def test_an_attack_counts_as_contained_by_its_outcome_too() -> None:
    """What succeeds is told, and so is one that passes for a failure of the infrastructure, or that leaks."""
    attack = next(each for each in ATTACKS if each.name == "fork bomb")
    bounded, many = Guest(processes=130), Guest(processes=450)
    assert Verdict(attack, Facts(outcome="timeout", guest=bounded), None, True, 0.0).contained
    assert not Verdict(attack, Facts(outcome="timeout", guest=many), None, True, 0.0).contained
    assert not Verdict(attack, Facts(outcome="infra_error", guest=bounded), None, True, 0.0).contained
    leaked = Facts(outcome="timeout", guest=bounded, found=("hotkey",))
    assert not Verdict(attack, leaked, None, True, 0.0).contained
