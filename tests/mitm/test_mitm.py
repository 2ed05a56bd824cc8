"""Whoever sits between validator and guest reads nothing, changes nothing, and gets no result taken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.mitm.catalogue import SHORT

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow(reason="guests and the man in the middle are processes, one of each an attack")
@pytest.mark.timeout(300)
def test_a_man_in_the_middle_gains_nothing_in_version_2_and_much_in_version_1() -> None:
    """One attack of each kind; `make mitm` has all of them. What succeeds in version 1 is no secret."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.mitm", "--short"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["attacks"] == len(SHORT)
    assert figures["tampered"] >= len(SHORT) - 1
    refused = ("v2_succeeded", "tampered_accepted", "plaintext_seen", "forged_results")
    assert [figures[name] for name in refused] == [0, 0, 0, 0]
    assert figures["relays_passed"] == 2
    assert {"key swap, both", "replay, to the guest", "downgrade, played by himself"} <= set(
        figures["v1_succeeded"]
    )
    assert figures["v1_allowed_v2_guest_succeeded"] == ["downgrade, played by himself"]
