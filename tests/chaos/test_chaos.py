"""Chaos, short: the validator killed at its most telling points, the others in between."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _command(output: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.chaos", "--short", "--output", str(output), *arguments]


@pytest.mark.slow(reason="starts the whole system and kills it eight times")
@pytest.mark.timeout(500)
def test_nothing_is_lost_doubled_or_left_by_kills_at_the_most_telling_points(tmp_path: Path) -> None:
    """Kills are exit statuses of -9; the figures are those of the Platform API's database and the VMM.

    A run before it was killed itself: the next one ends and removes what that left.
    """
    with subprocess.Popen(
        _command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stderr is not None
        next(line for line in killed.stderr if "1/" in line)
        killed.kill()
    earlier = Path((tmp_path / "state").read_text())
    assert earlier.exists()
    done = subprocess.run(
        _command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=450, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name in ("results_lost", "results_double", "vms_leaked", "unrecovered", "results_wrong"):
        assert report[name] == 0, name
    assert report["kills"] >= 6
    assert set(report["by_target"]) == {"validator", "platform-api", "vmm"}
    assert report["stored"] >= report["undelivered_at_kills"] >= 1
    assert not earlier.exists()
    assert not (tmp_path / "state").exists()
    assert [pid for pid in _pids() if str(earlier) in _command_line(pid)] == []


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
