"""The pages: links lead somewhere, and the commands that they show exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)")
BLOCK = re.compile(r"```(?:bash)?\n(.*?)```", re.DOTALL)
PROGRAMS = ("validator", "platform-api", "platform-vmm")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert broken == []


def _commands() -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            for line in block.splitlines():
                words = line.split("#")[0].removeprefix(".venv/bin/").split()
                if words and words[0] in PROGRAMS:
                    found.add(tuple(word for word in words if re.fullmatch(r"[a-z-]+", word)))
    return found


@pytest.mark.parametrize("command", sorted(_commands()), ids=" ".join)
def test_commands_exist(command: tuple[str, ...]) -> None:
    """Each command and option of a page is known to its program."""
    words = [word for word in command if not word.startswith("--")]
    given = [str(BIN / words[0]), *words[1:]]
    while True:
        done = subprocess.run([*given, "--help"], capture_output=True, text=True, timeout=50, check=False)
        if done.returncode == 0 or len(given) == 1:
            break
        given.pop()
    assert done.returncode == 0, done.stderr
    help_text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    for option in (word for word in command if word.startswith("--")):
        assert option in help_text, f"{option} is no option of {' '.join(given)}"


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", (ROOT / "README.md").read_text())))
)
def test_make_targets_of_the_readme_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0


def test_the_project_names_no_registry_and_no_foreign_path() -> None:
    """Facts about machines and hosts stay out of what is committed."""
    words = ["pypi" + ".org", "python" + "hosted", "/wo" + "rk/", "../sha" + "red"]
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    files = [ROOT / name for name in listed.stdout.splitlines() if not name.endswith((".gz", ".bin"))]
    named = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in files
        if path.is_file()
        for word in words
        if word in path.read_text(errors="replace")
    ]
    assert named == []


def test_the_usage_page_shows_the_example_configuration() -> None:
    page = (ROOT / "docs/usage.md").read_text()
    block = page.split("```toml\n")[1].split("```")[0]
    assert tomllib.loads(block)["resource_limits"] == {"cpu_cores": 4, "memory_mb": 2048, "disk_mb": 10240}
    assert block in (ROOT / "config.example.toml").read_text()
