"""Attestation, check by check: what is honest is accepted, all tampering refused for its reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.attestation.case import Case
from tests.attestation.evidence import ACCEPTED, World, judged
from tests.attestation.honest import honest, real_chains, real_measurements, real_replays
from tests.attestation.tampered_receipts import receipts
from tests.attestation.tampering import cases

from platform_validator.attestation.checks import MEANING, Check

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ["unshare", "--net", *([] if os.getuid() == 0 else ["--map-root-user"])]
"""In a network namespace of its own, in which nothing is up."""
UNREACHED = {
    Check.QUOTE_MISSING: "at Tee a missing quote is unavailable; a simulated one has its own test",
    Check.PLATFORM: "collateral of another platform is not used at all",
    Check.QUOTE_CHAIN: "the name of what dcap-qvl may come to refuse besides",
}


@pytest.fixture(scope="module")
def world() -> World:
    """One hierarchy for all."""
    return World()


@pytest.mark.parametrize("name", [name for name, _ in honest(World())])
async def test_what_is_honest_is_accepted(name: str, world: World) -> None:
    assert await judged(dict(honest(world))[name]) == ACCEPTED


@pytest.mark.parametrize("case", cases(), ids=str)
async def test_tampering_is_refused_for_its_reason(case: Case, world: World) -> None:
    assert await judged(case.make(world)) == case.answer


def test_every_check_is_made_to_fail() -> None:
    """But those that cannot be reached from outside, each with the reason why."""
    reached = {case.answer.removeprefix("refused ") for case in cases()}
    assert {check for check in Check if check.value not in reached} == set(UNREACHED)


def test_real_quotes_verify_replay_and_are_computed() -> None:
    """Two chains, two event logs of four registers each, and one image's MRTD and RTMR0 to 2."""
    assert (real_chains(), real_replays(), real_measurements()) == (2, 8, 4)


@pytest.mark.slow(reason="a process of its own, with every case once more")
def test_the_matrix_says_how_much_was_tried_and_needs_no_network() -> None:
    """The last line of stdout has the figures, which are counted; it runs without even a loopback."""
    if subprocess.run([*OFFLINE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this kernel or container lets us make no network namespace")
    command = [*OFFLINE, sys.executable, "-m", "tests.attestation"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["tampered_accepted"], figures["wrong_reason"]) == (0, 0)
    assert figures["tampered"] == len(cases()) + len(receipts()) >= 60
    assert figures["honest_accepted"] == len(list(honest(World())))


def test_the_page_names_every_check_in_its_order() -> None:
    """With its meaning, word for word."""
    page = (ROOT / "docs/attestation.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| (.*?) \|", page, re.MULTILINE)
    assert rows == [(check.value, MEANING[check]) for check in Check]
