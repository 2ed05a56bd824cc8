"""Commands that start processes end them when they are asked to end, however often they are asked."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import sys
from examples.demo.interrupts import run_command
def main():
    try:
        print("begun", flush=True)
        sys.stdin.readline()
        return 0
    finally:
        print("cleaning", flush=True)
        sys.stdin.readline()
        print("clean", flush=True)
run_command(main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_asked_to_end_cleans_up(number: signal.Signals, code: int) -> None:
    """Its exit code names the signal; SIGTERM again while it cleans up changes nothing."""
    command = [sys.executable, "-c", _PROGRAM]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.stdout.readline() == "cleaning\n"
        if number == signal.SIGTERM:
            process.send_signal(number)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "clean\n"
        assert process.wait(20) == code
