"""Fetching trees from git: real repositories, the real git client."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from pathlib import Path

import pytest
from author import Author
from fetching import an_author, refused
from processes import processes_about

from platform_protocol.bundle import unpack
from platform_protocol.canonical import sha256_hex
from platform_validator.challenges.git_source import GitSource
from platform_validator.challenges.repository import repository_url
from platform_validator.challenges.source import SourceError


@pytest.fixture
def author(tmp_path: Path) -> Author:
    """An author's repository, with nothing committed yet."""
    return an_author(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> GitSource:
    """A source whose operator allows files."""
    return GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}))


async def test_a_commit_becomes_a_bundle_named_by_its_hash(author: Author, source: GitSource) -> None:
    """A commit becomes a bundle named by its hash."""
    at = author.commit()
    tree = await source.fetch(f"file://{author}", at)
    data = tree.bundle.read_bytes()
    assert sha256_hex(data) == tree.bundle_sha256
    assert tree.bundle == source.bundle_path(tree.bundle_sha256)
    entries = {entry.path: entry for entry in unpack(data)}
    assert sorted(entries) == ["challenge.py", "link", "platform.toml", "run.sh"]
    assert entries["link"].link == "challenge.py"
    assert entries["run.sh"].executable
    assert tree.platform_toml == (author.folder / "platform.toml").read_bytes()
    assert source.file_of(tree, "challenge.py") == b"x = 1\n"


async def test_an_older_commit_is_fetched_exactly(author: Author, source: GitSource) -> None:
    """An older commit is fetched exactly."""
    old = author.commit()
    (author.folder / "challenge.py").write_text("x = 2\n")
    new = author.commit()
    first, second = [await source.fetch(str(author), at) for at in (old, new)]
    assert source.file_of(first, "challenge.py") == b"x = 1\n"
    assert source.file_of(second, "challenge.py") == b"x = 2\n"


async def test_the_cache_serves_what_it_has_when_the_repository_is_gone(
    author: Author, source: GitSource, tmp_path: Path
) -> None:
    """The cache serves what it has when the repository is gone."""
    at = author.commit()
    first = await source.fetch(str(author), at)
    await asyncio.to_thread(author.folder.rename, tmp_path / "elsewhere")
    assert await source.fetch(str(author), at) == first


async def test_nothing_but_bundles_and_their_index_stays_in_the_cache(
    author: Author, source: GitSource, tmp_path: Path
) -> None:
    """Nothing but bundles and their index stays in the cache."""
    await source.fetch(str(author), author.commit())
    assert sorted(each.name for each in (tmp_path / "cache").iterdir()) == ["bundles", "commits"]


async def test_a_damaged_bundle_is_fetched_again(author: Author, source: GitSource) -> None:
    """A damaged bundle is fetched again."""
    at = author.commit()
    tree = await source.fetch(str(author), at)
    tree.bundle.write_bytes(b"damaged")
    assert await source.fetch(str(author), at) == tree
    assert sha256_hex(tree.bundle.read_bytes()) == tree.bundle_sha256


@pytest.mark.parametrize("name", ["main", "v1.0", "abc123", "A" * 40, "a" * 41, "--upload-pack=x"])
async def test_a_branch_name_is_not_a_commit(author: Author, source: GitSource, name: str) -> None:
    """A branch name is not a commit."""
    author.commit()
    error = await refused(source, str(author), name)
    assert error.reason == "not_a_commit"
    assert error.lasting


async def test_a_commit_that_is_not_there_is_said_so(author: Author, source: GitSource) -> None:
    """A commit that is not there is said so."""
    author.commit()
    assert (await refused(source, str(author), "1" * 40)).reason == "commit_not_found"


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
        "https://host:99999/x",
        "https://-oProxyCommand=x/y",
        "https://host/`x`",
        "http://127.0.0.1::1/x",
        "owner/name\n",
        "",
    ],
)
async def test_other_schemes_than_allowed_are_refused(source: GitSource, repository: str) -> None:
    """Other schemes than allowed are refused."""
    assert (await refused(source, repository, "1" * 40)).reason == "repository_refused"


def test_owner_and_name_is_github_and_files_and_ssh_need_to_be_allowed() -> None:
    """Owner and name is GitHub's; files and ssh need to be allowed."""
    assert repository_url("owner/name", ()) == "https://github.com/owner/name"
    assert repository_url("http://127.0.0.1:99/x", ()) == "http://127.0.0.1:99/x"
    assert repository_url("http://[::1]:99/x", ()) == "http://[::1]:99/x"
    assert repository_url("/srv/x", {"file"}) == "file:///srv/x"
    assert repository_url("ssh://git@host:22/x", {"ssh"}) == "ssh://git@host:22/x"
    for refused_without in ("file:///x", "/x", "ssh://git@host/x"):
        with pytest.raises(SourceError, match=r"sources\.allow"):
            repository_url(refused_without, ())


async def test_a_submodule_is_refused(author: Author, source: GitSource) -> None:
    """A submodule is refused."""
    inner = author.commit()
    author.git("update-index", "--add", "--cacheinfo", f"160000,{inner},inner")
    author.git("commit", "-q", "-m", "with a submodule")
    error = await refused(source, str(author), author.git("rev-parse", "HEAD"))
    assert error.reason == "tree_refused"
    assert "submodule" in str(error)


async def test_a_link_out_of_the_tree_is_refused(author: Author, source: GitSource) -> None:
    """A link out of the tree is refused."""
    (author.folder / "out").symlink_to("../../etc/passwd")
    assert (await refused(source, str(author), author.commit())).reason == "tree_refused"


async def test_a_tree_over_the_limit_is_refused_before_it_is_read(author: Author, tmp_path: Path) -> None:
    """A tree over the limit is refused before it is read."""
    (author.folder / "large").write_bytes(bytes(100_000))
    small = GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}), max_bytes=50_000)
    error = await refused(small, str(author), author.commit())
    assert error.reason == "tree_refused"
    assert "50000" in str(error)


async def test_a_tree_without_platform_toml_is_refused(author: Author, source: GitSource) -> None:
    """A tree without platform toml is refused."""
    (author.folder / "platform.toml").unlink()
    assert (await refused(source, str(author), author.commit())).reason == "no_platform_toml"


async def test_attributes_and_filters_of_the_tree_change_nothing(author: Author, source: GitSource) -> None:
    """Attributes and filters of the tree change nothing."""
    (author.folder / ".gitattributes").write_text("*.py filter=evil text eol=crlf export-ignore\n")
    tree = await source.fetch(str(author), author.commit())
    assert source.file_of(tree, "challenge.py") == b"x = 1\n"


async def test_a_fetch_that_takes_too_long_is_ended(author: Author, tmp_path: Path) -> None:
    """A fetch that takes too long is ended."""
    at = author.commit()
    for milliseconds in (0, 1, 3, 10, 20, 30, 50, 80):
        hasty = GitSource(
            cache=tmp_path / "cache",
            allow=frozenset({"file"}),
            timeout=timedelta(milliseconds=milliseconds),
        )
        with contextlib.suppress(SourceError):
            await hasty.fetch(str(author), at)
            continue
        error = await refused(hasty, str(author), at)
        assert error.reason == "git_timed_out"
        assert not list((tmp_path / "cache").glob("fetch-*"))
        assert list(processes_about(str(tmp_path / "cache"))) == []


async def test_a_fetch_that_is_cancelled_leaves_nothing(author: Author, tmp_path: Path) -> None:
    """Cancelled at any moment, its processes are gone and its folder is removed."""
    at = author.commit()
    for milliseconds in (0, 2, 10, 25, 40, 60):
        source = GitSource(cache=tmp_path / str(milliseconds), allow=frozenset({"file"}))
        fetching = asyncio.ensure_future(source.fetch(str(author), at))
        await asyncio.wait([fetching], timeout=milliseconds / 1000)
        fetching.cancel()
        await asyncio.wait([fetching])
        assert not list((tmp_path / str(milliseconds)).glob("fetch-*"))
        assert list(processes_about(str(tmp_path / str(milliseconds)))) == []


async def test_terminal_escapes_of_a_server_stay_out_of_the_reason(tmp_path: Path, source: GitSource) -> None:
    """Terminal escapes of a server stay out of the reason."""
    error = await refused(source, str(tmp_path / "no\u001b[31msuch"), "1" * 40)
    assert "\u001b" not in str(error)


async def test_the_cache_is_limited_and_what_is_in_use_stays(author: Author, tmp_path: Path) -> None:
    """A bundle that an instance boots from is not evicted by what others fetch."""
    source = GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}), max_cache=1)
    trees = []
    for number in range(3):
        author.write("challenge.py", f"x = {number}\n")
        trees.append(await source.fetch(str(author), author.commit()))
        source.in_use = lambda: {trees[0].bundle_sha256}
    # A process later nothing is fresh.
    later = GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}), max_cache=1)
    later.in_use = source.in_use
    author.write("challenge.py", "x = 9\n")
    trees.append(await later.fetch(str(author), author.commit()))
    assert [tree.bundle.exists() for tree in trees] == [True, False, False, True]


async def test_a_cache_that_cannot_be_written_is_said_so(author: Author, tmp_path: Path) -> None:
    """A full or read-only disk, here a file in the folder's place, fails the fetch and not the process."""
    (tmp_path / "cache").write_text("in the way")
    source = GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}))
    assert (await refused(source, str(author), author.commit())).reason == "cache_failed"
