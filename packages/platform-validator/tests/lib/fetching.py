"""An author whose trees are fetched, and fetches that must not succeed."""

from __future__ import annotations

from pathlib import Path

import pytest
from author import Author

from platform_validator.challenges.git_source import GitSource
from platform_validator.challenges.source import SourceError


def an_author(tmp_path: Path) -> Author:
    """An author's repository, with nothing committed yet."""
    author = Author(tmp_path / "served" / "repository")
    author.write("run.sh", "#!/bin/sh\n")
    (author.folder / "run.sh").chmod(0o755)
    (author.folder / "link").symlink_to("challenge.py")
    return author


async def refused(source: GitSource, repository: str, at: str) -> SourceError:
    """The error of a fetch that must not succeed."""
    with pytest.raises(SourceError) as caught:
        await source.fetch(repository, at)
    return caught.value
