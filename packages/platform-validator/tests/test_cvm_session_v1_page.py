"""docs/attestation.md has a table of the quirks of version 1, each with the test that shows it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_names_a_test_for_each_quirk() -> None:
    """Every test of these files but this one, and no test that is nowhere."""
    page = (ROOT / "docs" / "attestation.md").read_text()
    section = page[page.index("## Version 1 of the session") :]
    section = section[: section.index("\n## ")]
    named = re.findall(r"`(test_\w+)`", section)
    quirks = "".join(path.read_text() for path in Path(__file__).parent.glob("test_cvm_session_v1_*.py"))
    here = re.findall(r"^(?:async )?def (test_\w+)", quirks, re.MULTILINE)
    assert set(here) - set(named) == {"test_the_page_names_a_test_for_each_quirk"}
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in tests] == []
