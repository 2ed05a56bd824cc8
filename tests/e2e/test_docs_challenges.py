"""The page for authors: what it shows works, and what it lists is what the schema has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import platform_protocol

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/challenges.md").read_text()


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)


def test_the_schema_file_and_the_table_are_what_the_models_say() -> None:
    """platform-toml.schema.json and the table of the page are written by a script, and not by hand."""
    done = run(sys.executable, "scripts/platform_toml.py", "--check")
    assert done.returncode == 0, done.stderr


def test_the_schema_is_shipped_with_the_package() -> None:
    """Editors find it beside the module that reads the file."""
    schema = json.loads((Path(platform_protocol.__file__).parent / "platform-toml.schema.json").read_text())
    assert set(schema["properties"]) == {
        *("name", "version", "entry"),
        *("cvm", "execution", "network", "result", "env", "scoring"),
    }
    assert schema["additionalProperties"] is False


@pytest.mark.slow(reason="starts the check and a contained submission")
def test_the_challenge_of_the_page_is_checked_and_runs(tmp_path: Path) -> None:
    """The page's own challenge passes its check, and scores a submission."""
    toml = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    code = re.search(r"```python\n# challenge\.py\n(.*?)```", PAGE, re.DOTALL)
    assert toml is not None
    assert code is not None
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/platform.toml").write_text(toml[1])
    (tmp_path / "tree/challenge.py").write_text(code[1])
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission/main.py").write_text("print(sum(map(int, input().split())))\n")
    checked = run(
        str(Path(sys.executable).parent / "validator"), "challenges", "check", str(tmp_path / "tree")
    )
    assert checked.returncode == 0, checked.stdout
    done = run(
        sys.executable,
        *("-m", "platform_challenge_sdk.testing"),
        *(str(tmp_path / "tree"), str(tmp_path / "submission")),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["score"] == 1.0


def test_every_reason_of_a_source_is_on_the_page() -> None:
    """An operator or author who sees a word finds it."""
    source = (ROOT / "packages/platform-validator/src/platform_validator/challenges/source.py").read_text()
    words = set(re.findall(r"`([a-z_]+)`(?=[ ,].*\|)", source)) - {"github_commit"}
    assert len(words) > 10
    assert [word for word in sorted(words) if f"`{word}`" not in PAGE] == []
