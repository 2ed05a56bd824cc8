"""Fetching a challenge's tree from git at its exact commit, into the content-addressed cache of bundles.

The git client runs as a subprocess on an untrusted repository: nothing is checked out, so no hook, filter
or attribute of the tree is ever in force; objects are listed and read, and packed by our own code.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from platform_protocol.bundle import BundleInvalid, TreeEntry, pack, unpack
from platform_protocol.canonical import sha256_hex
from platform_validator.errors import ValidatorError

MAX_BUNDLE = 1024 * 1024 * 1024
MAX_ENTRIES = 20_000
MAX_PLATFORM_TOML = 256 * 1024
_MAX_LISTING = 32 * 1024 * 1024
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_OWNER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}")
_LISTED = re.compile(rb"(\d{6}) (\w+) ([0-9a-f]+) +(\d+|-)\t(.*)", re.DOTALL)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_LINK, _EXECUTABLE = "120000", "100755"
_PROTOCOLS = "file:http:https"


class SourceError(ValidatorError):
    """A challenge's code could not be had. `reason` is a stable word; `lasting`: only a new commit helps."""

    def __init__(self, reason: str, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class FetchedTree:
    """A tree in the cache: `bundle` is the file, named by `bundle_sha256`."""

    bundle_sha256: str
    bundle: Path
    platform_toml: bytes


@dataclass(frozen=True, slots=True)
class _Listed:
    mode: str
    object_id: str
    size: int
    path: str


class Source(Protocol):
    """Gives a challenge's tree at a commit: `GitSource`, or a simulation's."""

    async def fetch(self, repository: str, commit: str) -> FetchedTree:
        """The tree. Raises SourceError."""

    def file_of(self, tree: FetchedTree, path: str) -> bytes:
        """A file of a fetched tree. Raises SourceError."""


class GitSource:
    """Fetches trees and keeps their bundles.

    Args:
        cache: The cache folder; `bundles/` and `commits/` are made below it, 0700.
        allow: Schemes allowed beside https (and http on loopback): `file`.
        timeout: Of one fetch, all tries together.
        max_bytes: Of one tree.
    """

    def __init__(
        self,
        *,
        cache: Path,
        allow: frozenset[str] = frozenset(),
        timeout: timedelta = timedelta(minutes=5),
        max_bytes: int = MAX_BUNDLE,
    ) -> None:
        self._cache = cache
        self._allow = allow
        self._timeout = timeout.total_seconds()
        self._max_bytes = max_bytes

    def bundle_path(self, sha256: str) -> Path:
        """Where a bundle is, or would be."""
        return self._cache / "bundles" / f"{sha256}.tar"

    def keep(self, bundle: bytes) -> str:
        """Put a bundle of our own making where CVMs fetch theirs; its SHA-256.

        Raises:
            OSError: It cannot be written.
        """
        sha256 = sha256_hex(bundle)
        if not self.bundle_path(sha256).exists():
            _write(self.bundle_path(sha256), bundle)
        return sha256

    async def fetch(self, repository: str, commit: str) -> FetchedTree:
        """The tree of a commit, from the cache when it was fetched before.

        Raises:
            SourceError: `not_a_commit`, `repository_refused`, `commit_not_found`, `git_failed`,
                `git_timed_out`, `tree_refused`, `no_platform_toml`, `cache_failed`.
        """
        if not _COMMIT.fullmatch(commit):
            raise SourceError(
                "not_a_commit",
                f"expected 40 or 64 lower-case hex digits, got {commit[:80]!r}: name a commit, not a branch",
                lasting=True,
            )
        url = self.url_of(repository)
        index = self._cache / "commits" / hashlib.sha256(f"{url}\0{commit}".encode()).hexdigest()
        cached = await asyncio.to_thread(self._cached, index)
        if cached is not None:
            return cached
        work = self._cache / f"fetch-{secrets.token_hex(8)}"
        try:
            async with asyncio.timeout(self._timeout):
                entries = await self._entries(url, commit, work)
            return await asyncio.to_thread(self._keep, entries, index)
        except TimeoutError as error:
            raise SourceError("git_timed_out", f"{url}: not fetched within {self._timeout:.0f} s") from error
        except OSError as error:
            raise SourceError(
                "cache_failed", f"the cache {self._cache} cannot be written: {error}"
            ) from error
        finally:
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)

    def url_of(self, repository: str) -> str:
        """The URL that git is given.

        Raises:
            SourceError: `repository_refused`.
        """
        if _OWNER_NAME.fullmatch(repository):
            return f"https://github.com/{repository}"
        refused = SourceError(
            "repository_refused",
            f"expected an https URL, owner/name, or a scheme of sources.allow ({sorted(self._allow)}), "
            f"got {repository[:200]!r}",
            lasting=True,
        )
        if not repository.isprintable() or repository.startswith("-"):
            raise refused
        if repository.startswith("/"):
            repository = f"file://{repository}"
        try:
            parts = urlsplit(repository)
            host = parts.hostname
        except ValueError as error:
            raise refused from error
        allowed = (
            (parts.scheme == "https" and host)
            or (parts.scheme == "http" and host in _LOOPBACK)
            or (parts.scheme == "file" and not host and "file" in self._allow)
        )
        if not allowed or parts.username is not None:
            raise refused
        return repository

    async def _entries(self, url: str, commit: str, work: Path) -> list[TreeEntry]:
        await asyncio.to_thread(lambda: work.mkdir(parents=True, mode=0o700))
        kind = "sha256" if len(commit) == 64 else "sha1"  # noqa: PLR2004 - hex digits of SHA-256
        await self._git(work, "init", "--quiet", "--bare", f"--object-format={kind}", "repo")
        await self._fetch(url, commit, work)
        listing = await self._git(work, "ls-tree", "-r", "-z", "-l", "--full-tree", commit, repo=True)
        listed = _listed(listing, self._max_bytes)
        return await self._read(work, listed)

    async def _fetch(self, url: str, commit: str, work: Path) -> None:
        quiet = ("fetch", "--quiet", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head")
        try:
            await self._git(work, *quiet, "--depth=1", "--", url, commit, repo=True)
        except SourceError as shallow:
            # Some servers serve only what a branch points at: fetch the branches, then look for it.
            try:
                await self._git(work, *quiet, "--", url, "+refs/heads/*:refs/heads/*", repo=True)
                await self._git(work, "cat-file", "-e", f"{commit}^{{commit}}", repo=True)
            except SourceError as error:
                if "fetch" in str(error):
                    raise shallow from error
                raise SourceError("commit_not_found", f"{url} has no commit {commit}") from error

    async def _read(self, work: Path, listed: list[_Listed]) -> list[TreeEntry]:
        wanted = "".join(f"{each.object_id}\n" for each in listed).encode()
        answer = await self._git(work, "cat-file", "--batch", repo=True, given=wanted)
        entries: list[TreeEntry] = []
        at = 0
        for each in listed:
            at = answer.index(b"\n", at) + 1
            data = answer[at : at + each.size]
            at += each.size + 1
            entries.append(_entry(each, data))
        return entries

    async def _git(
        self, work: Path, *arguments: str, repo: bool = False, given: bytes | None = None
    ) -> bytes:
        argv = [
            "git",
            "-c",
            "core.hooksPath=/dev/null",
            "-c",
            "protocol.allow=never",
            "-c",
            "protocol.https.allow=always",
            "-c",
            "protocol.http.allow=always",
            "-c",
            f"protocol.file.allow={'always' if 'file' in self._allow else 'never'}",
            "-c",
            "fetch.fsckObjects=true",
            "-c",
            "gc.auto=0",
            "-c",
            "maintenance.auto=false",
            "-c",
            "credential.helper=",
            "-c",
            "http.followRedirects=false",
            *(("--git-dir", str(work / "repo")) if repo else ()),
            *arguments,
        ]
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=work,
            env=_environment(work),
            stdin=asyncio.subprocess.PIPE if given is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            output, errors = await process.communicate(given)
        except BaseException:
            _kill(process.pid)
            await process.wait()
            raise
        if process.returncode != 0:
            said = "".join(c for c in errors.decode(errors="replace") if c.isprintable() or c == " ")[-500:]
            raise SourceError("git_failed", f"git {arguments[0]} failed: {said}")
        return output

    def _cached(self, index: Path) -> FetchedTree | None:
        try:
            sha256 = index.read_text().strip()
            data = self.bundle_path(sha256).read_bytes()
        except OSError:
            return None
        if sha256_hex(data) != sha256:
            return None
        return FetchedTree(sha256, self.bundle_path(sha256), _platform_toml(unpack(data)))

    def _keep(self, entries: list[TreeEntry], index: Path) -> FetchedTree:
        platform_toml = _platform_toml(entries)
        try:
            data = pack(entries)
        except BundleInvalid as error:
            raise SourceError("tree_refused", str(error), lasting=True) from error
        sha256 = sha256_hex(data)
        _write(self.bundle_path(sha256), data)
        _write(index, f"{sha256}\n".encode())
        return FetchedTree(sha256, self.bundle_path(sha256), platform_toml)

    def file_of(self, tree: FetchedTree, path: str) -> bytes:
        """One file of a fetched tree (blocking).

        Raises:
            SourceError: `no_such_file`.
        """
        for entry in unpack(tree.bundle.read_bytes()):
            if entry.path == path and entry.link is None:
                return entry.data
        raise SourceError("no_such_file", f"platform.toml names {path!r}: no file of the tree", lasting=True)


def _environment(work: Path) -> dict[str, str]:
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(work),
        "LC_ALL": "C",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "/bin/false",
        "GIT_ALLOW_PROTOCOL": _PROTOCOLS,
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_NO_LAZY_FETCH": "1",
    }


def _kill(leader: int) -> None:
    try:
        os.killpg(leader, 9)
    except ProcessLookupError:
        return


def _listed(listing: bytes, max_bytes: int) -> list[_Listed]:
    if len(listing) > _MAX_LISTING:
        raise SourceError("tree_refused", "the tree's listing is too long", lasting=True)
    lines = listing.split(b"\0")[:-1]
    if len(lines) > MAX_ENTRIES:
        raise SourceError("tree_refused", f"the tree has over {MAX_ENTRIES} files", lasting=True)
    found, total = [], 0
    for line in lines:
        match = _LISTED.fullmatch(line)
        if match is None:
            raise SourceError("git_failed", f"git ls-tree said {line[:80]!r}")
        mode, kind, object_id, size, path = (part.decode(errors="surrogateescape") for part in match.groups())
        if kind != "blob":
            raise SourceError("tree_refused", f"{path!r} is a submodule: they are not fetched", lasting=True)
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise SourceError("tree_refused", f"a path is no UTF-8: {path!r}", lasting=True) from error
        total += int(size)
        if total > max_bytes:
            raise SourceError("tree_refused", f"the tree is larger than {max_bytes} bytes", lasting=True)
        found.append(_Listed(mode, object_id, int(size), path))
    return found


def _entry(listed: _Listed, data: bytes) -> TreeEntry:
    if listed.mode == _LINK:
        try:
            return TreeEntry(listed.path, link=data.decode())
        except UnicodeDecodeError as error:
            raise SourceError(
                "tree_refused", f"the link {listed.path!r} is no UTF-8", lasting=True
            ) from error
    return TreeEntry(listed.path, data, executable=listed.mode == _EXECUTABLE)


def _platform_toml(entries: list[TreeEntry]) -> bytes:
    for entry in entries:
        if entry.path == "platform.toml" and entry.link is None:
            if len(entry.data) > MAX_PLATFORM_TOML:
                raise SourceError(
                    "tree_refused", f"platform.toml is larger than {MAX_PLATFORM_TOML} bytes", lasting=True
                )
            return entry.data
    raise SourceError("no_platform_toml", "the tree has no platform.toml at its root", lasting=True)


def _write(path: Path, data: bytes) -> None:
    """Atomically: a reader sees all of it or nothing, and a crash leaves nothing half written."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
