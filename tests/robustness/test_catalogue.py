"""Every clause of the catalogue of failures has a test, and every test's clause is in the catalogue."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "testing.md"
ROW = re.compile(r"^\| (\d+) \| `([a-z0-9-]+)` \| .+ \|$", re.MULTILINE)
CASES = range(1, 29)

Clause = tuple[int, str]


def marked() -> Iterator[tuple[int, tuple[str, ...], Path]]:
    """What `pytest.mark.robustness(...)` says, wherever it stands in a test module."""
    for folder in (*ROOT.glob("packages/*/tests"), ROOT / "tests"):
        for path in folder.rglob("test_*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.robustness":
                    number, *words = (ast.literal_eval(argument) for argument in node.args)
                    yield number, tuple(words), path


def test_each_clause_has_a_test_and_each_mark_a_clause() -> None:
    """The page and the marks name the same; numbers alone would not show what is missing."""
    listed: Counter[Clause] = Counter((int(number), word) for number, word in ROW.findall(PAGE.read_text()))
    assert {number for number, _ in listed} == set(CASES)
    assert set(listed.values()) == {1}, "a clause is listed once"
    tested = {(number, word) for number, words, _ in marked() for word in words}
    assert listed.keys() - tested == set(), "listed and not tested"
    assert tested - listed.keys() == set(), "tested and not listed"


def test_each_mark_names_its_clauses() -> None:
    """A number without a clause shows nothing."""
    assert [path for _, words, path in marked() if not words] == []


@pytest.mark.slow(reason="pytest collects in a process of its own")
def test_a_case_is_selected_by_its_number() -> None:
    """And nothing else is; a number that is none is told."""

    def collect(cases: str) -> subprocess.CompletedProcess[str]:
        quiet = ["-q", "--collect-only", "-p", "no:cacheprovider"]
        files = ["tests/daemon/test_stopped_process.py", "tests/daemon/test_drain_phases.py"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *quiet, "--robustness", cases, *files],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    found = [line for line in collect("3").stdout.splitlines() if "::" in line]
    assert found
    assert {line.partition("::")[0] for line in found} == {"tests/daemon/test_stopped_process.py"}
    wrong = collect("three")
    assert wrong.returncode == pytest.ExitCode.USAGE_ERROR
    assert "expected numbers" in wrong.stderr
