"""The demo as a test: the whole job on one machine, through an outage, and after a `kill -9` of itself."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _command(output: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "examples.demo", "--output", str(output), *arguments]


def assert_verified_by_a_second_program(*files: Path) -> None:
    """`examples/verify_receipt.py` imports nothing of the project; all of it holds, up to the signatures."""
    program = ROOT / "examples" / "verify_receipt.py"
    words = re.findall(r"^(?:import|from) (\w+)", program.read_text(), re.MULTILINE)
    assert not [word for word in words if word.startswith("platform")]
    assert len(program.read_text().splitlines()) <= 150
    command = [sys.executable, str(program), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the quote's signatures hold" in done.stdout


def assert_signed_with_what_the_cvm_used(receipt: Path) -> None:
    """It ran Python, which takes CPU time and memory, and its result went over the network."""
    statement = json.loads(base64.b64decode(json.loads(receipt.read_text())["payload"]))
    used = json.loads(statement["predicate"]["result"])["resource_usage"]
    assert 50 < used["cpu_time_ms"] < 600_000
    assert 2**23 < used["memory_peak_bytes"] < 2**31
    assert 0 < used["disk_bytes"] < 2**31
    assert 1000 < used["network_bytes"] < 2**31


@pytest.mark.slow(reason="starts the whole system and evaluates twelve submissions")
@pytest.mark.timeout(240)
def test_every_submission_ends_as_expected_although_the_platform_api_is_killed_for_ten_seconds(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        _command(tmp_path, "--outage", "10"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=230,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert (report["jobs"], report["scored"], report["failed_submissions"]) == (12, 6, 6)
    for name in ("infra_errors", "results_lost", "vms_left", "processes_left"):
        assert report[name] == 0, name
    assert report["receipts"] == report["jobs"]
    receipts = tmp_path / "receipts"
    for name in ("deflate", "crash"):
        what = [receipts / f"{name}.json", receipts / "simulated-root.pem", receipts / "collateral.json"]
        assert_verified_by_a_second_program(*what)
    assert_signed_with_what_the_cvm_used(receipts / "words.json")


@pytest.mark.slow(reason="starts two VMMs, and waits for the dead one's jobs to be given back")
@pytest.mark.timeout(300)
def test_every_job_ends_although_one_of_two_vmms_is_killed(tmp_path: Path) -> None:
    """Its jobs are the infrastructure's failures and run again; what is on it is gone once it is back."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo.hosts", "--short", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["succeeded"] == report["jobs"] == 8
    assert report["released_as_infra"] == report["attempts"] - report["jobs"] >= 1
    assert min(report["cvms_made"].values()) >= 1
    for name in ("blamed_on_submissions", "cvms_not_gone", "vms_left"):
        assert report[name] == 0, name
    assert report["left"] == {}


@pytest.mark.slow(reason="starts the whole system twice")
@pytest.mark.timeout(240)
def test_after_a_kill_9_of_the_demo_the_next_one_cleans_up_and_holds(tmp_path: Path) -> None:
    with subprocess.Popen(
        _command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as first:
        assert first.stdout is not None
        next(line for line in first.stdout if "are queued" in line)
        first.send_signal(signal.SIGKILL)
    state = Path((tmp_path / "state").read_text())
    assert state.exists()
    done = subprocess.run(
        _command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert not state.exists()
    left = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(state) in _command_line(int(entry.name))
    ]
    assert left == []


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
