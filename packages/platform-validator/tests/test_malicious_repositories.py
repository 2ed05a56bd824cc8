"""Repositories that were made to do harm, each a real one and served by git's own server.

Every case shows: a stable word and a clear message; nothing outside the cache changed, nothing but whole
bundles in it; no process left; a good challenge beside it is fetched as if nothing were.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from author import PLATFORM_TOML, Author, packed_header, tree_of, zeros_deflated
from job_house import CHALLENGE, CVM, OTHER, TOML, House, new_commit
from trap import MIB, Trap, traps, varint

from platform_protocol.platform_messages import ActiveChallenge
from platform_validator.store.records import InstanceState

ZEROS_2_GIB = "77e9132b46cb9535f286f18974872f40049d1a89"
ZEROS_3_GIB = "1077662767e8de998abc7dbe3649b8df9a2baf72"


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    with traps(tmp_path) as made:
        yield made


@pytest.mark.parametrize("name", [b"..", b".", b".git", b"a/b"])
async def test_a_path_that_leaves_the_tree(trap: Trap, name: bytes) -> None:
    """A tree with such an entry is refused by git's own check, before anything is read."""
    author = trap.author()
    inner = author.tree(("100644", b"canary", author.blob(b"dead")))
    at = author.commit_of(author.challenge_tree(("40000", name, inner)))
    word, message = await trap.springs(trap.url_of(author), at)
    assert word == "tree_refused"
    assert "git's check of the tree" in message


@pytest.mark.parametrize(
    "target", ["../outside/canary", "/etc/passwd", "a/../../x", "x" * 5000, "\udcff", "a\0b", ""]
)
async def test_a_symlink_out_of_the_tree(trap: Trap, target: str) -> None:
    """A link that leaves the tree, or is none that a bundle can hold, is refused by its name."""
    author = trap.author()
    aim = author.blob(target.encode(errors="surrogateescape"))
    at = author.commit_of(author.challenge_tree(("120000", b"way-out", aim)))
    word, message = await trap.springs(trap.url_of(author), at)
    assert word == "tree_refused"
    assert "way-out" in message


async def test_a_link_in_place_of_platform_toml(trap: Trap) -> None:
    """A platform.toml that is a link is no platform.toml."""
    author = trap.author()
    (author.folder / "platform.toml").unlink()
    (author.folder / "platform.toml").symlink_to("../outside/canary")
    assert (await trap.springs(trap.url_of(author), author.commit()))[0] == "no_platform_toml"


async def test_a_file_below_a_link(trap: Trap) -> None:
    """A path that goes through a link of the same tree is refused."""
    author = trap.author()
    inner = author.tree(("100644", b"x", author.blob(b"x")))
    tree = author.challenge_tree(("120000", b"a", author.blob(b"b")), ("40000", b"a", inner))
    word, _ = await trap.springs(trap.url_of(author), author.commit_of(tree))
    assert word == "tree_refused"


async def test_a_file_of_2_gb(trap: Trap) -> None:
    """A server that can leave it out does not even send it; nothing of that size is ever written."""
    author = trap.author()
    author.pack_by_hand([(ZEROS_2_GIB, 3, packed_header(3, 2048 * MIB) + zeros_deflated(2048))])
    at = author.commit_of(author.challenge_tree(("100644", b"large", ZEROS_2_GIB)))
    word, message = await trap.springs(trap.url_of(author), at)
    assert word == "tree_refused"
    assert "'large' is larger than 67108864 bytes" in message


@pytest.mark.slow(reason="packs and fetches seven MiB that do not compress")
async def test_more_bytes_than_the_limit(trap: Trap) -> None:
    """A fetch that brings more than its limit is ended by the watcher while it runs."""
    trap.server.filters = False
    author = trap.author()
    for number in range(7):
        (author.folder / f"noise{number}").write_bytes(os.urandom(MIB))
    at = author.commit()
    word, message = await trap.springs(trap.url_of(author), at, trap.source_of(max_bytes=MIB // 4))
    assert word == "repository_too_large"
    assert "expected at most" in message or "over" in message


async def test_a_delta_bomb(trap: Trap) -> None:
    """Forty kilobytes of delta that stand for 3 GiB: git runs into its memory limit, and is all that does."""
    trap.server.filters = False
    author = trap.author()
    base = author.blob(bytes(65536))
    copies = 3072 * 16
    delta = varint(65536) + varint(65536 * copies) + b"\x80" * copies
    packed = packed_header(7, len(delta)) + bytes.fromhex(base) + zlib.compress(delta)
    author.pack_by_hand(
        [
            (base, 3, packed_header(3, 65536) + zlib.compress(bytes(65536))),
            (ZEROS_3_GIB, 7, packed),
        ]
    )
    at = author.commit_of(author.challenge_tree(("100644", b"a", base), ("100644", b"b", ZEROS_3_GIB)))
    word, message = await trap.springs(trap.url_of(author), at)
    assert word == "repository_too_large"
    assert "memory" in message


async def test_a_million_files(trap: Trap) -> None:
    """A million paths out of two trees: the listing is ended at its limit."""
    author = trap.author()
    empty = author.blob(b"")
    inner = author.tree(*(("100644", b"%04d" % number, empty) for number in range(1000)))
    outer = author.tree(*(("40000", b"%04d" % number, inner) for number in range(1000)))
    at = author.commit_of(author.challenge_tree(("40000", b"many", outer)))
    word, message = await trap.springs(trap.url_of(author), at)
    assert word == "tree_refused"
    assert "20000 files" in message


async def test_a_billion_billion_files(trap: Trap) -> None:
    """Six levels more are no worse."""
    author = trap.author()
    tree = author.tree(*(("100644", b"%04d" % number, author.blob(b"")) for number in range(10)))
    for _ in range(17):
        tree = author.tree(*(("40000", b"%d" % number, tree) for number in range(10)))
    at = author.commit_of(author.challenge_tree(("40000", b"many", tree)))
    assert (await trap.springs(trap.url_of(author), at))[0] == "tree_refused"


@pytest.mark.slow(reason="writes two hundred trees, a git process each")
async def test_folders_two_hundred_deep(trap: Trap) -> None:
    """A path that no bundle can hold is refused."""
    author = trap.author()
    tree = author.tree(("100644", b"x", author.blob(b"x")))
    for _ in range(200):
        tree = author.tree(("40000", b"d", tree))
    at = author.commit_of(author.challenge_tree(("40000", b"deep", tree)))
    word, message = await trap.springs(trap.url_of(author), at)
    assert word == "tree_refused"
    assert "255 bytes" in message


async def test_hooks_and_settings_of_a_local_repository(trap: Trap) -> None:
    """A repository on this machine whose hooks and settings run a command: none of them is run."""
    author = trap.author()
    act = f"touch {trap.folder}/outside/harm; exit 1"
    hooks = author.folder / ".git/hooks"
    at = author.commit_of(author.challenge_tree())
    for name in ("post-checkout", "post-upload-pack", "pre-upload", "reference-transaction", "post-fetch"):
        (hooks / name).write_text(f"#!/bin/sh\n{act}\n")
        (hooks / name).chmod(0o755)
    for setting in (
        "core.fsmonitor",
        "core.sshCommand",
        "uploadpack.packObjectsHook",
        "core.pager",
        "core.alternateRefsCommand",
        "credential.helper",
        "filter.evil.smudge",
    ):
        author.git("config", setting, act)
    author.git("config", f"url.ext::sh -c '{act}'.insteadOf", "http")
    assert await trap.springs(f"file://{author}", at) == ("", "nothing was refused")
    assert not (trap.folder / "outside/harm").exists()


async def test_filters_lfs_and_hooks_of_a_tree(trap: Trap) -> None:
    """Attributes change no byte, LFS pointers stay pointers, a .gitconfig or hooks folder is just files."""
    author = trap.author()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    author.write(".gitattributes", "* filter=evil text eol=crlf ident export-subst\n*.bin filter=lfs\n")
    author.write(".lfsconfig", f"[lfs]\n\turl = {trap.url_of(author)}\n")
    author.write("weights.bin", pointer)
    author.write("hooks/post-checkout", f"#!/bin/sh\ntouch {trap.folder}/outside/harm\n")
    author.git("config", "filter.evil.clean", "cat")
    at = author.commit()
    assert await trap.springs(trap.url_of(author), at) == ("", "nothing was refused")
    tree = await trap.source.fetch(trap.url_of(author), at)
    assert trap.source.file_of(tree, "weights.bin") == pointer.encode()
    assert trap.source.file_of(tree, "challenge.py") == b"x = 1\n"


@pytest.mark.parametrize("url", ["/etc", "ext::sh -c 'touch harm'", "file:///etc", "--upload-pack=touch"])
async def test_a_submodule(trap: Trap, url: str) -> None:
    """A submodule, whatever its URL, is refused and never fetched."""
    author = trap.author()
    modules = author.blob(f'[submodule "inner"]\n\tpath = inner\n\turl = {url}\n'.encode())
    tree = author.challenge_tree(("100644", b".gitmodules", modules), ("160000", b"inner", "1" * 40))
    word, _ = await trap.springs(trap.url_of(author), author.commit_of(tree))
    assert word == "tree_refused"


@pytest.mark.parametrize(
    "url",
    [
        "ext::sh -c touch% {}/harm",
        "ext::{}/program",
        "fd::17",
        "https::ext::sh",
        "--upload-pack=touch {}/harm",
        "-u{}/program",
        "https://host/$(touch {}/harm)",
        "ssh://-oProxyCommand=touch%20{}/harm/x",
    ],
)
async def test_a_repository_that_is_a_command(trap: Trap, url: str) -> None:
    """Remote helpers and options in place of a URL never reach git."""
    word, message = await trap.springs(url.format(trap.canary.parent), "1" * 40)
    assert word == "repository_refused"
    assert "https URL" in message


async def test_terminal_escapes(trap: Trap) -> None:
    """A commit message is never read; a path with escapes is refused, and shown escaped."""
    author = trap.author()
    at = author.commit("\x1b]0;owned\x07\x1b[2J fine")
    assert await trap.springs(trap.url_of(author), at) == ("", "nothing was refused")
    author.write("\x1b[31mred\r\n", "x")
    word, message = await trap.springs(trap.url_of(author), author.commit())
    assert word == "tree_refused"
    assert "\\x1b[31mred" in message


@pytest.mark.slow(reason="packs and fetches 50 MB")
async def test_a_platform_toml_of_50_mb(trap: Trap) -> None:
    """It is refused by its size, which git tells, before it is read."""
    author = trap.author()
    author.write("platform.toml", PLATFORM_TOML + "# " + "x" * 50_000_000)
    word, message = await trap.springs(trap.url_of(author), author.commit())
    assert word == "platform_toml_invalid"
    assert "expected at most 262144 bytes, got 5000" in message


@pytest.mark.parametrize(
    "more",
    [
        "x = " + "[" * 10_000 + "]" * 10_000,
        "x = " + "{a=" * 10_000 + "1" + "}" * 10_000,
        "[" + ".".join("a" * 10_000) + "]",
        "[scoring]\n" + ".".join("a" * 10_000) + " = 1",
        "[scoring]\nx = " + "[" * 100 + "]" * 100,
    ],
    ids=["arrays", "tables", "unknown keys", "free keys", "free arrays"],
)
async def test_a_platform_toml_nested_ten_thousand_deep(trap: Trap, more: str) -> None:
    """It is refused as nested too deep, wherever it is nested."""
    author = trap.author()
    author.write("platform.toml", PLATFORM_TOML + more + "\n")
    word, message = await trap.springs(trap.url_of(author), author.commit())
    assert word == "platform_toml_invalid"
    assert "deep" in message


async def test_a_hostile_challenge_beside_a_good_one(trap: Trap, tmp_path: Path) -> None:
    """It is Failed with the word and the message, and the other is Active."""
    house = House(tmp_path / "house")
    house.folder.mkdir()
    house.publish(new_commit(house.folder, TOML))
    author = trap.author()
    (author.folder / "way-out").symlink_to("../../outside/canary")
    hostile = ActiveChallenge(
        id=OTHER,
        name="hostile",
        status="active",
        github_repo=trap.url_of(author),
        github_commit=author.commit(),
        resources=CVM,
    )
    house.platform.put_challenge(hostile)
    async with house.open():
        await house.state(InstanceState.FAILED, OTHER)
        await house.state(InstanceState.ACTIVE)
        shown = next(view for view in house.challenges.views() if view.id == OTHER)
        assert shown.candidate is not None
        assert shown.candidate.reason is not None
        assert shown.candidate.reason.startswith("tree_refused: the link 'way-out' leaves the tree")
        serving = house.challenges.acquire(CHALLENGE)
        assert serving is not None
        assert house.challenges.bundles_in_use() == {serving.plan.bundle_sha256}


async def test_a_tree_that_is_no_tree(trap: Trap) -> None:
    """Objects that git itself would not write are refused, by the server's git or by ours."""
    author = trap.author()
    for tree in (
        author.challenge_tree(("40000", b"", author.tree(("100644", b"x", author.blob(b"x"))))),
        author.git("hash-object", "-w", "-t", "tree", "--literally", "--stdin", given=b"\0\xff\xfe"),
        author.git("hash-object", "-w", "-t", "tree", "--literally", "--stdin", given=_unsorted(author)),
    ):
        word, _ = await trap.springs(trap.url_of(author), _commit_literally(author, tree))
        assert word in {"tree_refused", "git_unreachable", "git_failed"}


def _unsorted(author: Author) -> bytes:
    blob = author.blob(PLATFORM_TOML.encode())
    return tree_of(("100644", b"platform.toml", blob), ("100644", b"a", blob), ("100644", b"a", blob))


def _commit_literally(author: Author, tree: str) -> str:
    data = f"tree {tree}\nauthor a <a@b> 0 +0000\ncommitter a <a@b> 0 +0000\n\nx\n".encode()
    at = author.git("hash-object", "-w", "-t", "commit", "--literally", "--stdin", given=data)
    (author.folder / ".git/refs/heads/main").write_text(f"{at}\n")
    return at
