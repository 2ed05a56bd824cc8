"""Chaos, short: the validator killed at its most telling points, the others in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from examples.demo.processes import MARK

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow(reason="starts the whole system and kills it eight times")
@pytest.mark.timeout(500)
def test_nothing_is_lost_doubled_or_left_by_kills_at_the_most_telling_points(tmp_path: Path) -> None:
    """Kills are exit statuses of -9; the figures are those of the Platform API's database and the VMM.

    What an earlier run left when it was killed itself is ended and removed.
    """
    earlier = Path(tempfile.mkdtemp(prefix="platform-chaos-"))
    (tmp_path / "state").write_text(str(earlier))
    with subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: str(earlier)}) as left:
        threading.Thread(target=left.wait, daemon=True).start()
        done = subprocess.run(
            [sys.executable, "-m", "tests.chaos", "--short", "--output", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=450,
            check=False,
        )
        left.kill()
    assert left.returncode == -signal.SIGTERM
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for name in ("results_lost", "results_double", "vms_leaked", "unrecovered", "results_wrong"):
        assert report[name] == 0, name
    assert report["kills"] >= 6
    assert set(report["by_target"]) == {"validator", "platform-api", "vmm"}
    assert report["stored"] >= report["undelivered_at_kills"] >= 1
    assert not earlier.exists()
    assert not (tmp_path / "state").exists()
