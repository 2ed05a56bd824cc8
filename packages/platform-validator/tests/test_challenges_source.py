"""Fetching trees from git: real repositories, the real git client."""

from __future__ import annotations

import asyncio
import os
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

from platform_protocol.bundle import unpack
from platform_protocol.canonical import sha256_hex
from platform_validator.challenges.source import GitSource, SourceError


def git(folder: Path, *arguments: str) -> str:
    """Run git as an author of a challenge."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@example.invalid",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.invalid",
    }
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=env, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(folder: Path, message: str = "a commit") -> str:
    """Commit everything; returns the commit."""
    git(folder, "add", "-A", "-f")
    git(folder, "commit", "-q", "--allow-empty", "-m", message)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """An author's repository, with nothing committed yet."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "platform.toml").write_text('name = "digits"\nversion = "1"\n')
    (folder / "challenge.py").write_text("x = 1\n")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("challenge.py")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> GitSource:
    """A source whose operator allows files."""
    return GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}))


async def refused(source: GitSource, repository: str, at: str) -> SourceError:
    """The error of a fetch that must not succeed."""
    with pytest.raises(SourceError) as caught:
        await source.fetch(repository, at)
    return caught.value


async def test_a_commit_becomes_a_bundle_named_by_its_hash(repository: Path, source: GitSource) -> None:
    """A commit becomes a bundle named by its hash."""
    at = commit(repository)
    tree = await source.fetch(f"file://{repository}", at)
    data = tree.bundle.read_bytes()
    assert sha256_hex(data) == tree.bundle_sha256
    assert tree.bundle == source.bundle_path(tree.bundle_sha256)
    entries = {entry.path: entry for entry in unpack(data)}
    assert sorted(entries) == ["challenge.py", "link", "platform.toml", "run.sh"]
    assert entries["link"].link == "challenge.py"
    assert entries["run.sh"].executable
    assert tree.platform_toml == (repository / "platform.toml").read_bytes()
    assert source.file_of(tree, "challenge.py") == b"x = 1\n"


async def test_an_older_commit_is_fetched_exactly(repository: Path, source: GitSource) -> None:
    """An older commit is fetched exactly."""
    old = commit(repository)
    (repository / "challenge.py").write_text("x = 2\n")
    new = commit(repository)
    first, second = [await source.fetch(str(repository), at) for at in (old, new)]
    assert source.file_of(first, "challenge.py") == b"x = 1\n"
    assert source.file_of(second, "challenge.py") == b"x = 2\n"


async def test_the_cache_serves_what_it_has_when_the_repository_is_gone(
    repository: Path, source: GitSource, tmp_path: Path
) -> None:
    """The cache serves what it has when the repository is gone."""
    at = commit(repository)
    first = await source.fetch(str(repository), at)
    await asyncio.to_thread(repository.rename, tmp_path / "elsewhere")
    assert await source.fetch(str(repository), at) == first


async def test_nothing_but_bundles_and_their_index_stays_in_the_cache(
    repository: Path, source: GitSource, tmp_path: Path
) -> None:
    """Nothing but bundles and their index stays in the cache."""
    await source.fetch(str(repository), commit(repository))
    assert sorted(each.name for each in (tmp_path / "cache").iterdir()) == ["bundles", "commits"]


async def test_a_damaged_bundle_is_fetched_again(repository: Path, source: GitSource) -> None:
    """A damaged bundle is fetched again."""
    at = commit(repository)
    tree = await source.fetch(str(repository), at)
    tree.bundle.write_bytes(b"damaged")
    assert await source.fetch(str(repository), at) == tree
    assert sha256_hex(tree.bundle.read_bytes()) == tree.bundle_sha256


@pytest.mark.parametrize("name", ["main", "v1.0", "abc123", "A" * 40, "a" * 41, "--upload-pack=x"])
async def test_a_branch_name_is_not_a_commit(repository: Path, source: GitSource, name: str) -> None:
    """A branch name is not a commit."""
    commit(repository)
    error = await refused(source, str(repository), name)
    assert error.reason == "not_a_commit"
    assert error.lasting


async def test_a_commit_that_is_not_there_is_said_so(repository: Path, source: GitSource) -> None:
    """A commit that is not there is said so."""
    commit(repository)
    assert (await refused(source, str(repository), "1" * 40)).reason == "commit_not_found"


@pytest.mark.parametrize(
    "repository",
    [
        "ext::sh -c touch% /tmp/x",
        "ssh://host/x",
        "git://host/x",
        "http://example.invalid/x",
        "-oProxyCommand=x",
        "https://user:secret@host/x",
        "file://otherhost/x",
        "../../x",
        "https://",
        "owner/name\n",
        "",
    ],
)
async def test_other_schemes_than_allowed_are_refused(source: GitSource, repository: str) -> None:
    """Other schemes than allowed are refused."""
    assert (await refused(source, repository, "1" * 40)).reason == "repository_refused"


def test_owner_and_name_is_github_and_files_need_to_be_allowed(tmp_path: Path) -> None:
    """Owner and name is github and files need to be allowed."""
    plain = GitSource(cache=tmp_path)
    assert plain.url_of("owner/name") == "https://github.com/owner/name"
    assert plain.url_of("http://127.0.0.1:99/x") == "http://127.0.0.1:99/x"
    with pytest.raises(SourceError, match="allow"):
        plain.url_of("file:///x")


async def test_a_submodule_is_refused(repository: Path, source: GitSource) -> None:
    """A submodule is refused."""
    inner = commit(repository)
    git(repository, "update-index", "--add", "--cacheinfo", f"160000,{inner},inner")
    git(repository, "commit", "-q", "-m", "with a submodule")
    error = await refused(source, str(repository), git(repository, "rev-parse", "HEAD"))
    assert error.reason == "tree_refused"
    assert "submodule" in str(error)


async def test_a_link_out_of_the_tree_is_refused(repository: Path, source: GitSource) -> None:
    """A link out of the tree is refused."""
    (repository / "out").symlink_to("../../etc/passwd")
    assert (await refused(source, str(repository), commit(repository))).reason == "tree_refused"


async def test_a_tree_over_the_limit_is_refused_before_it_is_read(repository: Path, tmp_path: Path) -> None:
    """A tree over the limit is refused before it is read."""
    (repository / "large").write_bytes(bytes(100_000))
    small = GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}), max_bytes=50_000)
    error = await refused(small, str(repository), commit(repository))
    assert error.reason == "tree_refused"
    assert "50000" in str(error)


async def test_a_tree_without_platform_toml_is_refused(repository: Path, source: GitSource) -> None:
    """A tree without platform toml is refused."""
    (repository / "platform.toml").unlink()
    assert (await refused(source, str(repository), commit(repository))).reason == "no_platform_toml"


async def test_attributes_and_filters_of_the_tree_change_nothing(repository: Path, source: GitSource) -> None:
    """Attributes and filters of the tree change nothing."""
    (repository / ".gitattributes").write_text("*.py filter=evil text eol=crlf export-ignore\n")
    tree = await source.fetch(str(repository), commit(repository))
    assert source.file_of(tree, "challenge.py") == b"x = 1\n"


async def test_a_fetch_that_takes_too_long_is_ended(repository: Path, tmp_path: Path) -> None:
    """A fetch that takes too long is ended."""
    hasty = GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}), timeout=timedelta(0))
    assert (await refused(hasty, str(repository), commit(repository))).reason == "git_timed_out"
    assert not list((tmp_path / "cache").glob("fetch-*"))


async def test_terminal_escapes_of_a_server_stay_out_of_the_reason(tmp_path: Path, source: GitSource) -> None:
    """Terminal escapes of a server stay out of the reason."""
    error = await refused(source, str(tmp_path / "no\u001b[31msuch"), "1" * 40)
    assert "\u001b" not in str(error)
