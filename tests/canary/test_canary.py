"""No secret turns up where it does not belong, over a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow(reason="starts the whole system and two CVMs, and reads everything that they leave")
@pytest.mark.timeout(300)
@pytest.mark.robustness(28, "hotkey", "api-credentials", "other-values")
def test_no_secret_is_found_where_it_does_not_belong(tmp_path: Path) -> None:
    """And each is found where it was planted."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.canary", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["found"], report["found_by_a_cvm"], report["core_bytes_allowed"]) == (0, 0, 0)
    assert report["planted_found"] == report["canaries"] >= 9
    assert report["read_by_a_cvm"] > 100
