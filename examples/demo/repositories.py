"""Git repositories made from the example trees, as a challenge author would have them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def make_repository(tree: Path, target: Path) -> str:
    """Copy a challenge's tree (without its submissions) to `target` and commit it. Returns the commit."""
    shutil.copytree(tree, target, ignore=shutil.ignore_patterns("submissions", "__pycache__", ".*_cache"))
    _git(target, "init", "--quiet", "--initial-branch=main")
    return commit_all(target, f"{tree.name}: as shipped")


def commit_all(repository: Path, message: str) -> str:
    """Commit whatever was changed. Returns the commit."""
    _git(repository, "add", "--all")
    _git(repository, "commit", "--quiet", "--message", message)
    return _git(repository, "rev-parse", "HEAD").strip()


def _git(repository: Path, *arguments: str) -> str:
    author = ["-c", "user.name=Demo", "-c", "user.email=demo@example.invalid", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *author, *arguments], cwd=repository, check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout
