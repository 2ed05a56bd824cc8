"""A submission that takes all memory of its CVM is ended by the kernel, and the SDK is not."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from static_program import sockets_without_end

LIMIT = 192 * 1024 * 1024
SDK = """
import json, sys
from pathlib import Path
from platform_challenge_sdk.contained import MIB, Order, run_contained

folder = Path(sys.argv[1])
ballast = b"x" * (80 * MIB)  # or the run would be the larger one anyway
told = []
for program in json.loads(sys.argv[2]):
    (folder / "main.py").write_text(program)
    argv = ["./tiny"] if program == "tiny" else ["python3", "main.py"]
    order = Order(argv, folder, b"", 60.0, 2048 * MIB, {}, 1024 * MIB)
    outcome = run_contained(order)
    told.append([outcome.text, outcome.killed_by])
print(json.dumps(told))
"""
HOGS = {
    "one process": ("x = bytearray(1 << 30); print('had it')", ["", "signal:9"]),
    "files": (
        "with open('/tmp/x', 'wb') as file:\n    while True: file.write(bytes(1 << 20))",
        ["", "signal:9"],
    ),
    "sockets of a process smaller than bubblewrap": ("tiny", ["", "signal:9"]),
}


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group with a CVM's memory: version 1 or 2, whichever limits memory here."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    made = (first if first.is_dir() else second) / f"contained-test-{os.getpid()}"
    try:
        made.mkdir()
        limit = made / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")
        limit.write_text(str(LIMIT))
    except OSError as error:
        with contextlib.suppress(OSError):
            made.rmdir()
        pytest.skip(f"no control group that limits memory can be made here: {error}")
    yield made
    deadline = time.monotonic() + 30
    while True:
        try:
            made.rmdir()
        except OSError:
            assert time.monotonic() < deadline, "something of a run is left in its control group"
            time.sleep(0.05)
        else:
            return


@pytest.mark.slow(reason="fills 192 MiB of memory each time")
@pytest.mark.parametrize("hog", HOGS)
def test_the_sdk_survives_a_submission_that_takes_all_memory(cgroup: Path, tmp_path: Path, hog: str) -> None:
    """The killer ends the run, which the outcome says, and the next run works."""
    tmp_path.chmod(0o755)

    def join() -> None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    program, end = HOGS[hog]
    if program == "tiny":
        if os.uname().machine != "x86_64":
            pytest.skip("machine code of x86-64")
        (tmp_path / "tiny").write_bytes(sockets_without_end())
        (tmp_path / "tiny").chmod(0o755)
    programs = json.dumps([program, "print('works')"])
    done = subprocess.run(
        [sys.executable, "-c", SDK, str(tmp_path), programs],
        preexec_fn=join,
        capture_output=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: list[Any] = json.loads(done.stdout)
    assert told[0] == end
    assert told[1] == ["works\n", None]
