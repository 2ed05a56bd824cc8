"""A start that is killed at any statement of it: the next one finds the journal whole, or begins it.

Run as a program, it kills the starts: see `main`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from platform_validator.store.migrate import known_migrations
from platform_validator.store.opening import open_database

GOLDEN = Path(__file__).parent / "data" / "store"
VERSIONS = range(len(known_migrations()) + 1)


class Mortal(sqlite3.Connection):
    """Kills its process when it is about to run the nth statement of all."""

    left = 0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.set_trace_callback(self._count)

    @classmethod
    def _count(cls, statement: str) -> None:
        del statement
        cls.left -= 1
        if cls.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def prepared(path: Path, version: int) -> Path:
    """A journal of that version; of version 0 there is none."""
    for each in path.parent.iterdir():
        each.unlink()
    if version:
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript((GOLDEN / f"version-{version:04}.sql").read_text(encoding="utf-8"))
    return path


def opened(path: Path) -> list[str]:
    """Everything in it, once it was opened."""
    with closing(open_database(path)) as connection:
        return list(connection.iterdump())


def killed_at(statement: int, path: Path) -> bool:
    """Open it in a process that is killed at that statement; False when it was done before."""
    child = os.fork()
    if child == 0:
        Mortal.left = statement
        connect = sqlite3.connect
        sqlite3.connect = lambda *given, **named: connect(*given, **named, factory=Mortal)  # type: ignore[assignment]  # in this process alone
        open_database(path).close()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in {0, -signal.SIGKILL}:
        raise AssertionError(f"the start ended with {code}")
    return code != 0


@pytest.mark.slow(reason="some fifty starts, each killed")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.robustness(1, "starting")
def test_a_killed_start_is_made_good_by_the_next(tmp_path: Path, version: int) -> None:
    """Robustness 7: at every statement of creating, checking and migrating; no value is lost or doubled."""
    ran = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(version)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["killed"] > 5


def main() -> None:
    """Starts in folder `sys.argv[1]` on a journal of version `sys.argv[2]`; prints how many were killed."""
    path, version = Path(sys.argv[1]) / "validator.db", int(sys.argv[2])
    whole = opened(prepared(path, version))
    for statement in itertools.count(1):
        if not killed_at(statement, prepared(path, version)):
            break
        if opened(path) != whole:
            raise AssertionError(f"killed at statement {statement}, the next start finds something else")
    sys.stdout.write(json.dumps({"killed": statement - 1}))


if __name__ == "__main__":
    main()
