"""What tests need of the machine: `make test` installs it, and CI skips nothing for want of it."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = {*ROOT.glob("packages/*/tests/**/*.py"), *ROOT.glob("tests/**/*.py")} - {Path(__file__)}
TEST = """
import pathlib, pytest
@pytest.mark.needs("{need}", why="it is run")
def test_it():
    pathlib.Path("{begun}").touch()
"""


def needed() -> set[str]:
    """All that any test's mark names, but root."""
    calls = chain.from_iterable(re.findall(r"mark\.needs\(([^)]*)", path.read_text()) for path in TESTS)
    words = chain.from_iterable(re.findall(r'"([^"]+)"', call.partition("why=")[0]) for call in calls)
    return {word for word in words if word != "root"}


def test_make_test_installs_what_the_tests_need() -> None:
    """The package of each program and library stands in the recipe."""
    table = re.findall(r"\[([\w-]+)\]=(\S+?)[ )]", (ROOT / "scripts" / "system.sh").read_text())
    done = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    installed = " ".join(re.findall(r"scripts/system\.sh (.*)", done.stdout)).split()
    assert {"bwrap", "node", "libseccomp.so.2"} <= needed()
    assert needed() - {program for package, program in table if package in installed} == set()


def test_no_test_skips_itself_for_a_program_or_for_not_being_root() -> None:
    """That is what the mark is for."""
    own = re.compile(r"skipif\([^)]*(which|getuid)\(|(which|getuid)\([^\n]*\n\s+pytest\.skip\(")
    assert [path.name for path in TESTS if own.search(path.read_text())] == []


@pytest.mark.slow(reason="starts pytest")
@pytest.mark.parametrize(
    ("environment", "code"), [({}, 0), ({"CI": "true"}, 1)], ids=["one's own machine", "CI"]
)
@pytest.mark.parametrize("need", ["no-such-program", "libnosuch.so.1"])
def test_a_need_that_is_not_met_skips_or_fails(
    tmp_path: Path, environment: dict[str, str], code: int, need: str
) -> None:
    """It says what is missing, and that `make test` has it; the test itself is never begun."""
    (tmp_path / "test_it.py").write_text(TEST.format(need=need, begun=tmp_path / "begun"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "pyproject.toml", "-p", "conftest", tmp_path],
        cwd=ROOT,
        env={"PATH": "/usr/bin", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert f"needs {need} (it is run): 'make test', run as root, has all that tests need" in done.stdout
    assert ("1 skipped" in done.stdout, "1 error" in done.stdout) == (code == 0, code == 1)
    assert not (tmp_path / "begun").exists()
