"""Fetches a challenge's tree from git at its exact commit, into the cache of bundles."""

from __future__ import annotations

import asyncio
import io
import shutil
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO

import structlog

from platform_protocol.bundle import MAX_BUNDLE_BYTES, BundleInvalid, TreeMember
from platform_validator.challenges.bundles import BundleCache
from platform_validator.challenges.git import Credentials, Git
from platform_validator.challenges.repository import checked_commit, repository_url
from platform_validator.challenges.source import FetchedTree, SourceError
from platform_validator.challenges.tree import (
    EXECUTABLE,
    LINK,
    MAX_FILES,
    MAX_LISTING,
    MAX_PLATFORM_TOML,
    Blob,
    judge_listing,
    refused,
)

MAX_NAMED_FILE = 1024 * 1024
_GIB = 1024 * 1024 * 1024
_ROOM = 4 * 1024 * 1024
_MAX_LINK = 4096
_FETCH = ("fetch", "--quiet", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head")
_EVERYTHING = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")

_log = structlog.get_logger(__name__)


class GitSource:
    """Fetches trees and keeps their bundles. See `source.Source`.

    Args:
        cache: The cache folder; `bundles/` and `commits/` are made below it, 0700.
        allow: Schemes allowed beside https (and http on loopback): `ssh`, `file`.
        credentials: The operator's, for private repositories.
        timeout: Of one fetch, all tries together.
        max_bytes: Of one tree; a fetch may take three times as much of the disk while it goes on.
        max_cache: Of all bundles together.
    """

    def __init__(
        self,
        *,
        cache: Path,
        allow: frozenset[str] = frozenset(),
        credentials: Credentials | None = None,
        timeout: timedelta = timedelta(minutes=5),
        max_bytes: int = MAX_BUNDLE_BYTES,
        max_cache: int = 10 * _GIB,
    ) -> None:
        self._folder = cache
        self._cache = BundleCache(cache, max_bytes=max_cache)
        self._allow = allow
        self._credentials = credentials or Credentials()
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._recovered = False
        self.in_use: Callable[[], Collection[str]] = frozenset
        """Hashes of the bundles that a CVM may still ask for: these are never evicted."""

    def bundle_path(self, sha256: str) -> Path:
        """Where a bundle is, or would be."""
        return self._cache.path_of(sha256)

    def keep(self, bundle: bytes) -> str:
        """Put a bundle of our own making where CVMs fetch theirs; its SHA-256 (blocking).

        Raises:
            OSError: It cannot be written.
        """
        return self._cache.put(bundle)

    async def fetch(self, repository: str, commit: str) -> FetchedTree:
        """The tree of a commit, from the cache when it was fetched before.

        Raises:
            SourceError: See there.
        """
        checked_commit(commit)
        url = repository_url(repository, self._allow)
        try:
            if not self._recovered:
                self._recovered = True
                await asyncio.to_thread(self._cache.recover)
            sha256 = await asyncio.to_thread(self._cache.find, url, commit)
            if sha256 is None:
                sha256 = await self._fetch(url, commit)
                await self._evict()
            return await asyncio.to_thread(self._tree, sha256)
        except BundleInvalid as error:
            raise SourceError("cache_failed", f"the cache {self._folder} is damaged: {error}") from error
        except OSError as error:
            why = error.strerror or error
            raise SourceError("cache_failed", f"the cache {self._folder} cannot be used: {why}") from error

    def file_of(self, tree: FetchedTree, path: str) -> bytes:
        """One file of a fetched tree, at most 1 MiB (blocking).

        Raises:
            SourceError: `no_such_file`, `tree_refused`, `cache_failed`.
        """
        try:
            data = self._cache.read(tree.bundle_sha256, path, MAX_NAMED_FILE)
        except BundleInvalid as error:
            raise refused(str(error)) from error
        except OSError as error:
            raise SourceError("cache_failed", f"{tree.bundle} cannot be read: {error}") from error
        if data is None:
            raise SourceError(
                "no_such_file", f"platform.toml names {path!r}: no file of the tree", lasting=True
            )
        return data

    async def _fetch(self, url: str, commit: str) -> str:
        work = self._cache.workspace()
        try:
            async with asyncio.timeout(self._timeout.total_seconds()):
                return await self._fetch_into(work, url, commit)
        except TimeoutError as error:
            within = f"{self._timeout.total_seconds():.0f} s"
            raise SourceError("git_timed_out", f"{url}: not fetched within {within}") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)

    async def _fetch_into(self, work: Path, url: str, commit: str) -> str:
        git = Git(
            folder=work,
            allow=self._allow,
            max_bytes=3 * self._max_bytes + _ROOM,
            deadline=self._timeout,
            credentials=self._credentials,
        )
        kind = "sha256" if len(commit) == 64 else "sha1"  # noqa: PLR2004 - hex digits of SHA-256
        await git.run(
            "init", "--quiet", "--bare", "--template=", f"--object-format={kind}", "repo", repo=False
        )
        await self._fetch_commit(git, url, commit)
        blobs = await self._list(git, commit)
        wanted = work / "wanted"
        await asyncio.to_thread(wanted.write_text, "".join(f"{each.object_id}\n" for each in blobs))
        objects = await git.run("cat-file", "--batch", given=wanted, max_file=self._max_bytes + MAX_LISTING)
        return await asyncio.to_thread(self._keep, url, commit, blobs, objects)

    async def _fetch_commit(self, git: Git, url: str, commit: str) -> None:
        most, config = 3 * self._max_bytes, git.folder / "repo" / "config"
        plain = await asyncio.to_thread(config.read_bytes)
        # A file over the limit is not even sent, by servers that can leave it out.
        limited = f"--filter=blob:limit={self._max_bytes + 1}"
        try:
            await git.run(*_FETCH, limited, "--depth=1", "--", url, commit, max_file=most)
        except SourceError as error:
            if error.reason != "commit_not_found":
                raise
            # Some servers give only what a branch or tag points at: fetch those, then look for it.
            _log.info("commit_not_served_alone", repository=url, commit=commit, error=str(error))
            await git.run(*_FETCH, limited, "--", url, *_EVERYTHING, max_file=most)
        # What was left out is not fetched when it is looked at, as git would.
        await asyncio.to_thread(config.write_bytes, plain)
        try:
            await git.run("cat-file", "-e", f"{commit}^{{commit}}")
        except SourceError as error:
            raise SourceError(
                "commit_not_found",
                f"{url} has no commit {commit}: never pushed, or no longer there after a forced push",
            ) from error

    async def _list(self, git: Git, commit: str) -> Sequence[Blob]:
        try:
            listing = await git.run("ls-tree", "-r", "-z", "-l", "--full-tree", commit, max_file=MAX_LISTING)
        except SourceError as error:
            if error.reason != "repository_too_large":
                raise
            raise refused(f"the tree has over {MAX_FILES} files, or very long paths") from error
        return judge_listing(await asyncio.to_thread(listing.read_bytes), self._max_bytes)

    def _keep(self, url: str, commit: str, blobs: Sequence[Blob], objects: Path) -> str:
        with objects.open("rb") as file:
            members, at = [], 0
            for blob in blobs:
                file.seek(at)
                at += len(file.readline()) + blob.size + 1
                members.append(_member(file, blob))
            try:
                return self._cache.keep(url, commit, members)
            except BundleInvalid as error:
                raise refused(str(error)) from error

    def _tree(self, sha256: str) -> FetchedTree:
        platform_toml = self._cache.read(sha256, "platform.toml", MAX_PLATFORM_TOML)
        if platform_toml is None:
            raise SourceError("no_platform_toml", "the tree has no platform.toml at its root", lasting=True)
        return FetchedTree(sha256, self._cache.path_of(sha256), platform_toml)

    async def _evict(self) -> None:
        in_use = frozenset(self.in_use())
        gone = await asyncio.to_thread(self._cache.evict, in_use)
        if gone:
            _log.info("bundles_evicted", bundles=gone)


def _member(objects: IO[bytes], blob: Blob) -> TreeMember:
    """A blob as git's batch output has it, at the file's position."""
    at = objects.tell()
    if blob.mode == LINK:
        if blob.size > _MAX_LINK:
            raise refused(f"the link {blob.path!r} is longer than {_MAX_LINK} bytes")
        try:
            return TreeMember(blob.path, link=objects.read(blob.size).decode())
        except UnicodeDecodeError as error:
            raise refused(f"the link {blob.path!r} is no UTF-8") from error

    def content() -> IO[bytes]:
        objects.seek(at)
        return objects

    return TreeMember(
        blob.path, blob.size, content if blob.size else io.BytesIO, executable=blob.mode == EXECUTABLE
    )
