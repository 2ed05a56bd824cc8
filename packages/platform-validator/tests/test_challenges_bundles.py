"""The cache of bundles: named by hash, limited, never wrong, whatever happened to its files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import wait_until

from platform_protocol.bundle import BundleInvalid, TreeMember
from platform_validator.challenges.bundles import FRESH, BundleCache

URL = "https://example.invalid/x"


class Hands:
    """A cache with a clock of its own."""

    def __init__(self, folder: Path, max_bytes: int = 10**9) -> None:
        self.now = 0.0
        self.cache = BundleCache(folder, max_bytes=max_bytes, monotonic=lambda: self.now)

    def keep(self, number: int, size: int = 50_000) -> str:
        """Keep a bundle of about that size, used `number` seconds after the epoch."""
        data = bytes([number]) * size
        sha256 = self.cache.keep(URL, f"{number:040x}", [TreeMember("x", size, lambda: io.BytesIO(data))])
        os.utime(self.cache.path_of(sha256), (number, number))
        return sha256

    def there(self, *hashes: str) -> list[bool]:
        """Which of them are there."""
        return [self.cache.path_of(sha256).exists() for sha256 in hashes]


@pytest.fixture
def hands(tmp_path: Path) -> Hands:
    """Room for two of three bundles."""
    return Hands(tmp_path, 130_000)


def test_what_was_used_least_recently_goes_first(hands: Hands) -> None:
    """Over the limit the least recently used goes, with its names, and only as many as needed."""
    first, second, third = (hands.keep(number) for number in (1, 2, 3))
    hands.now = 2 * FRESH
    assert hands.cache.evict(frozenset()) == [first]
    assert hands.there(first, second, third) == [False, True, True]
    assert hands.cache.find(URL, f"{1:040x}") is None
    assert hands.cache.find(URL, f"{2:040x}") == second
    assert hands.cache.evict(frozenset()) == []


def test_a_hit_is_a_use(hands: Hands) -> None:
    """What is found again is used: the other one goes."""
    first, second, third = (hands.keep(number) for number in (1, 2, 3))
    assert hands.cache.find(URL, f"{1:040x}") == first
    hands.now = 2 * FRESH
    assert hands.cache.evict(frozenset()) == [second]
    assert hands.there(first, third) == [True, True]


def test_what_is_in_use_is_never_evicted(hands: Hands) -> None:
    """Pinned bundles stay, also when they alone are over the limit."""
    hashes = [hands.keep(number) for number in (1, 2, 3)]
    hands.now = 2 * FRESH
    assert hands.cache.evict(frozenset(hashes)) == []
    assert hands.cache.evict(frozenset(hashes[:2])) == [hashes[2]]


def test_what_was_fetched_a_moment_ago_counts_as_in_use(hands: Hands) -> None:
    """Between a fetch and the instance that it was for nothing is evicted."""
    hashes = [hands.keep(number) for number in (1, 2, 3)]
    hands.now = FRESH - 1
    assert hands.cache.evict(frozenset()) == []
    assert hands.there(*hashes) == [True, True, True]


def test_a_bundle_that_changed_on_disk_is_not_found(hands: Hands) -> None:
    """One flipped bit, a cut, a missing file, a name that is damaged: as if it had never been there."""
    sha256 = hands.keep(1)
    path, commit = hands.cache.path_of(sha256), f"{1:040x}"
    whole = path.read_bytes()
    for damaged in (whole[:700] + bytes([whole[700] ^ 1]) + whole[701:], whole[:-1], b""):
        path.write_bytes(damaged)
        assert hands.cache.find(URL, commit) is None
    path.write_bytes(whole)
    assert hands.cache.find(URL, commit) == sha256
    index = next((path.parent.parent / "commits").iterdir())
    for name in (b"../../../etc/passwd", b"\xff", b"", b"\0"):
        index.write_bytes(name)
        assert hands.cache.find(URL, commit) is None


def test_what_cannot_be_a_bundle_leaves_nothing(hands: Hands, tmp_path: Path) -> None:
    """A refused tree leaves no file."""
    with pytest.raises(BundleInvalid):
        hands.cache.keep(URL, "1" * 40, [TreeMember("../x")])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_files_are_the_validators_alone(hands: Hands, tmp_path: Path) -> None:
    """Files are 0600, folders 0700."""
    hands.keep(1)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    folders = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()}
    assert (modes, folders) == ({0o600}, {0o700})


_KEEPS = """
import io, os, sys
from pathlib import Path
from platform_protocol.bundle import TreeMember
from platform_validator.challenges.bundles import BundleCache
cache = BundleCache(Path(sys.argv[1]), max_bytes=10**9)
(cache.workspace() / "pack").write_bytes(bytes(1000))
print("begun", flush=True)
for number in range(10**6):
    data = os.urandom(3_000_000)
    member = TreeMember("x", len(data), lambda: io.BytesIO(data))
    cache.keep("https://example.invalid/x", f"{number:040x}", [member])
"""


@pytest.mark.slow(reason="starts a process and kills it, three times")
def test_kill_9_leaves_whole_bundles_and_nothing_else(tmp_path: Path) -> None:
    """Killed while it keeps bundles, it has whole ones; the next process removes what was half done."""
    for pause in (0.0, 0.05, 0.11):
        with subprocess.Popen(
            [sys.executable, "-c", _KEEPS, str(tmp_path)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            wait_until("kept", lambda: list(tmp_path.glob("commits/*")))
            time.sleep(pause)  # into the middle of the next one
            process.kill()
        cache = BundleCache(tmp_path, max_bytes=10**9)
        cache.recover()
        names = [index.name for index in (tmp_path / "commits").iterdir()]
        assert not [name for name in names if name.startswith(".")]
        assert not list(tmp_path.glob("fetch-*"))
        assert not list(tmp_path.glob("bundles/.*"))
        for number in range(len(names)):
            assert cache.find(URL, f"{number:040x}") is not None
        for path in tmp_path.rglob("*.tar"):
            path.unlink()
        for path in tmp_path.glob("commits/*"):
            path.unlink()
