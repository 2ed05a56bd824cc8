"""Killed at each point of a job's life and of a challenge's update, where nothing else is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.robustness.killed_at import ELSEWHERE

from platform_validator.crashpoint import POINTS


@pytest.mark.slow(reason="a world for each point")
@pytest.mark.robustness(1, "each-point", "update")
def test_killed_once_at_each_point_every_law_holds() -> None:
    """Each point is struck; every job ends, nothing runs twice, no CVM is left (the simulation's laws)."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.robustness.killed_at"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    worlds = json.loads(ran.stdout)
    assert set(worlds) == set(POINTS) - ELSEWHERE
    for point, world in worlds.items():
        assert world == {"struck": 1, "queued": 12, "ended": 12, "violations": []}, point
