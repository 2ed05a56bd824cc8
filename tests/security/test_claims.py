"""docs/security.md: every claim of "Link by link", also of what an attacker can do, names a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "docs" / "security.md").read_text().split("## Link by link")[1].split("\n## ")[0]
TESTS = "\n".join(
    path.read_text()
    for folder in (ROOT / "tests", *ROOT.glob("packages/*/tests"))
    for path in folder.rglob("*.py")
)
_NAME = re.compile(r"`(test_\w+)`")


def claims() -> list[str]:
    """The clauses of the table's cells, which semicolons divide; those that point elsewhere are none."""
    rows = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if line.startswith("| ")]
    cells = [cell for row in rows[1:] for cell in row[1:]]
    return [clause.strip() for cell in cells for clause in cell.split("; ") if clause.strip()]


@pytest.mark.parametrize("claim", claims())
def test_a_claim_names_its_test(claim: str) -> None:
    """In the table, whoever reads it can look for himself."""
    assert _NAME.search(claim), claim


@pytest.mark.parametrize("name", sorted(set(_NAME.findall(SECTION))))
def test_a_test_that_is_named_is_there(name: str) -> None:
    """Under that name."""
    assert re.search(rf"def {name}\(", TESTS)
