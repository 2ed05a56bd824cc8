"""Fetching trees from git over HTTP, from git's own server, and over SSH."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from author import Author
from fetching import an_author, refused
from git_server import GitServer
from processes import processes_about
from waiting import wait_until

from platform_validator.challenges.git import Credentials
from platform_validator.challenges.git_source import GitSource


@pytest.fixture
def author(tmp_path: Path) -> Author:
    """An author's repository, with nothing committed yet."""
    return an_author(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> GitSource:
    """A source whose operator allows files."""
    return GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}))


@pytest.fixture
def server(tmp_path: Path, author: Author) -> Iterator[GitServer]:
    """Serves the author's repository."""
    with GitServer(tmp_path / "served") as serving:
        yield serving


def url_of(server: GitServer) -> str:
    """The author's repository."""
    return server.url_of("repository/.git")


async def test_one_commit_is_fetched_alone(author: Author, server: GitServer, source: GitSource) -> None:
    """Of a hundred commits one comes, also when no branch points at it."""
    at = author.commit()
    for number in range(5):
        author.write("challenge.py", f"x = {number}\n")
        author.commit()
    tree = await source.fetch(url_of(server), at)
    assert source.file_of(tree, "challenge.py") == b"x = 1\n"
    assert len([path for path in server.asked if "upload-pack" in path]) <= 3


async def test_a_server_that_refuses_single_commits_is_asked_for_its_branches(
    author: Author, server: GitServer, source: GitSource
) -> None:
    """Where only branches and tags may be asked for, these are, and the commit is looked up in them."""
    server.exact = False
    old = author.commit()
    author.git("checkout", "-q", "-b", "aside")
    author.write("challenge.py", "x = 2\n")
    tagged = author.commit()
    author.git("tag", "v2")
    author.git("checkout", "-q", "main")
    author.git("branch", "-q", "-D", "aside")
    author.write("challenge.py", "x = 3\n")
    author.commit()
    assert source.file_of(await source.fetch(url_of(server), old), "challenge.py") == b"x = 1\n"
    assert source.file_of(await source.fetch(url_of(server), tagged), "challenge.py") == b"x = 2\n"
    assert (await refused(source, url_of(server), "1" * 40)).reason == "commit_not_found"


async def test_a_forced_push_takes_a_commit_away(
    author: Author, server: GitServer, source: GitSource
) -> None:
    """A commit that a forced push removed is said to be gone; what was fetched before stays usable."""
    kept = author.commit()
    author.write("challenge.py", "x = 2\n")
    gone = author.commit()
    before = await source.fetch(url_of(server), kept)
    author.git("reset", "-q", "--hard", kept)
    author.git("commit", "-q", "--amend", "--allow-empty", "-m", "another")
    author.git("reflog", "expire", "--expire=now", "--all")
    author.git("gc", "-q", "--prune=now")
    error = await refused(source, url_of(server), gone)
    assert error.reason == "commit_not_found"
    assert "forced push" in str(error)
    assert not error.lasting
    assert await source.fetch(url_of(server), kept) == before


async def test_a_server_that_is_down(author: Author, tmp_path: Path, source: GitSource) -> None:
    """The cache serves what it has, another process's too; the rest is said to be unreachable."""
    with GitServer(tmp_path / "served") as server:
        at, url = author.commit(), url_of(server)
        tree = await source.fetch(url, at)
    again = GitSource(cache=tmp_path / "cache")
    assert await again.fetch(url, at) == tree
    error = await refused(again, url, "1" * 40)
    assert error.reason == "git_unreachable"


async def test_a_repository_that_is_not_there(server: GitServer, source: GitSource) -> None:
    """It is said to be missing, or to want credentials."""
    assert (await refused(source, server.url_of("none/.git"), "1" * 40)).reason == "repository_not_found"
    server.password = "user:token-of-the-operator"
    assert (await refused(source, url_of(server), "1" * 40)).reason == "repository_not_found"


async def test_credentials_come_from_a_file_and_go_nowhere_else(
    author: Author, server: GitServer, tmp_path: Path
) -> None:
    """The token is sent to its host, and is in no argument, no environment and no message."""
    server.password = "user:token-of-the-operator"
    at, file = author.commit(), tmp_path / "credentials"
    host = url_of(server).removeprefix("http://").split("/")[0]
    file.write_text(f"http://user:token-of-the-operator@{host}\n")
    file.chmod(0o600)
    shown: list[bytes] = []

    def look(_: object) -> bool:
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                names = ("cmdline", "environ") if entry.name.isdigit() else ()
                shown.extend((entry / name).read_bytes() for name in names)
        return False

    server.instead = look
    source = GitSource(cache=tmp_path / "cache", credentials=Credentials(https=file))
    await source.fetch(url_of(server), at)
    assert any(b"credential-store --file=" in each for each in shown)
    assert not any(b"token-of-the-operator" in each for each in shown)
    # A refused one stays in the operator's file, and out of the message.
    server.password = "user:another"
    error = await refused(source, url_of(server), "1" * 40)
    assert error.reason == "repository_not_found"
    assert "token-of-the-operator" not in str(error)
    assert "token-of-the-operator" in file.read_text()
    # Another host does not get it.
    elsewhere = url_of(server).replace("127.0.0.1", "localhost")
    server.password = "user:token-of-the-operator"
    assert (await refused(source, elsewhere, at)).reason == "repository_not_found"


@pytest.mark.parametrize("mode", [0o640, 0o604, None])
async def test_a_credentials_file_that_others_can_read_is_refused(
    author: Author, server: GitServer, tmp_path: Path, mode: int | None
) -> None:
    """So is one that is not there."""
    file = tmp_path / "credentials"
    if mode is not None:
        file.write_text("http://user:token@127.0.0.1\n")
        file.chmod(mode)
    source = GitSource(cache=tmp_path / "cache", credentials=Credentials(https=file))
    assert (await refused(source, url_of(server), author.commit())).reason == "credentials_refused"


async def test_ssh_is_asked_nothing_and_told_whom_to_trust(
    author: Author, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Git's own ssh transport, with a program in ssh's place that notes its options."""
    at, key = author.commit(), tmp_path / "key"
    key.write_text("a key")
    key.chmod(0o600)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/options\nexec git upload-pack {author.folder}/.git\n'
    )
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    source = GitSource(
        cache=tmp_path / "cache",
        allow=frozenset({"ssh"}),
        credentials=Credentials(ssh_key=key, known_hosts=tmp_path / "known hosts"),
    )
    tree = await source.fetch("ssh://git@host.invalid:2222/x", at)
    assert source.file_of(tree, "challenge.py") == b"x = 1\n"
    options = (tmp_path / "options").read_text().splitlines()
    for option in (
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        "IdentitiesOnly=yes",
        f'IdentityFile="{key}"',
        f'UserKnownHostsFile="{tmp_path}/known hosts"',
        "git@host.invalid",
        "2222",
    ):
        assert option in options


_FETCHES = """
import asyncio, sys
from datetime import timedelta
from pathlib import Path
from platform_validator.challenges.git_source import GitSource
source = GitSource(cache=Path(sys.argv[1]), timeout=timedelta(seconds=3))
asyncio.run(source.fetch(sys.argv[2], "1" * 40))
"""


@pytest.mark.slow(reason="starts a process, kills it, and waits for its children's own time limit")
def test_kill_9_in_the_middle_of_a_fetch(author: Author, tmp_path: Path, server: GitServer) -> None:
    """What it started ends by its own limit, and what it left is removed by the next process."""
    asked, over, cache = threading.Event(), threading.Event(), tmp_path / "cache"

    def silent(_: object) -> bool:
        asked.set()
        return over.wait(50)

    at = author.commit()
    server.instead = silent
    command = [sys.executable, "-c", _FETCHES, str(cache), url_of(server)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        assert asked.wait(50)
        process.kill()
    assert list(cache.glob("fetch-*"))
    assert list(processes_about(str(cache)))
    wait_until("ended", lambda: not list(processes_about(str(cache))), within=50)
    over.set()
    server.instead = lambda _: False
    asyncio.run(GitSource(cache=cache).fetch(url_of(server), at))
    assert sorted(entry.name for entry in cache.iterdir()) == ["bundles", "commits"]
