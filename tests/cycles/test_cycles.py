"""Sandboxes by the hundred: nothing is left; and what is left on purpose is counted, kind by kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cycles.leaky_vmm import LEAKS

ROOT = Path(__file__).resolve().parents[2]
LEAKY = Path(__file__).with_name("leaky_vmm.py")

pytestmark = pytest.mark.needs("root", why="guests' uids and groups are counted")


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, the last line of standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cycles", "--output", str(folder), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow(reason="makes and destroys two hundred sandboxes, and kills their VMM twice")
@pytest.mark.timeout(450)
def test_two_hundred_cycles_leave_nothing_behind(tmp_path: Path) -> None:
    """Every fourth VM is killed while it boots; the VMM's memory is flat."""
    code, report, told = run(tmp_path, "--cycles", "200", "--kills", "2")
    assert code == 0, told
    assert (report["cycles"], report["leaks"], report["vmm_kills"]) == (200, 0, 2), told
    assert report["killed_during_boot"] >= 10


@pytest.mark.slow(reason="runs a VMM that leaks")
@pytest.mark.timeout(450)
def test_a_leak_of_each_kind_is_counted_and_fails_the_run(tmp_path: Path) -> None:
    """One of each with every sandbox; more than ten in all, for some are made before the counting begins."""
    short = ("--cycles", "40", "--kills", "0", "--settle", "1")
    code, report, told = run(tmp_path, *short, "--vmm", str(LEAKY), ",".join(LEAKS))
    assert code == 1
    found = report["by_kind"]
    assert set(found) == set(LEAKS)
    assert found.pop("memory") == 1, report
    assert all(count >= 20 for count in found.values()), told
    assert report["leaks"] >= 20 * len(found)
