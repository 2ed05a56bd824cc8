"""What others see of a process that holds secrets: nothing of its memory, also when it crashes."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from platform_validator import memory_guard

SOURCE = inspect.getsource(memory_guard)
NOBODY = "import os\nos.setresuid(65534, 65534, 65534)\nctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n"
"""Another user, and dumpable, as a program is that was started by that user."""


def started(code: str, folder: Path) -> subprocess.Popen[str]:
    """A process with a secret in its environment."""
    return subprocess.Popen(
        [sys.executable, "-I", "-c", f"{SOURCE}\n{code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={"HOTKEY_PASSPHRASE": "a canary"},
    )


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.needs("root", why="another user is played, twice")
def test_another_process_of_the_same_user_reads_no_environment(tmp_path: Path, guarded: bool) -> None:
    """Without the guard it would."""
    guard = "guard_memory()\n" if guarded else ""
    with started(f"{NOBODY}{guard}print('up', flush=True)\ninput()\n", tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        reader = (
            f"import json\n{NOBODY}try: print(json.dumps(open('/proc/{process.pid}/environ').read()))\n"
            "except OSError as error: print(json.dumps(error.strerror))\n"
        )
        with started(reader, tmp_path) as other:
            said = json.loads(other.communicate(timeout=50)[0])
        process.communicate("\n", timeout=50)
    assert said == "Permission denied" if guarded else "a canary" in said


def test_a_crash_leaves_no_core_file_and_starts_no_handler(tmp_path: Path) -> None:
    """The limit is 1, not 0, which handlers do not mind; and nothing is left."""
    code = (
        "import os, signal\n"
        "guard_memory()\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), flush=True)\n"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    with started(code, tmp_path) as process:
        said = process.communicate(timeout=50)[0].splitlines()
    assert process.returncode == -signal.SIGSEGV
    assert said == ["(1, 1)", "0"]
    assert list(tmp_path.iterdir()) == []
