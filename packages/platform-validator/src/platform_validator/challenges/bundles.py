"""The cache of bundles: each a file named by its hash, found again by repository and commit, limited.

A bundle is shared by all CVMs. What is in use is never evicted; of the rest the one that was used least
recently goes first. Nothing in it is believed before its hash was computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import IO

from platform_protocol.bundle import TreeMember, file_in, pack_into

FRESH = 600.0
_WORK = "fetch-"


class BundleCache:
    """`bundles/<sha256>.tar` and `commits/<sha256 of repository and commit>`, below a folder of its own.

    Blocking. One process at a time.

    Args:
        folder: Made where it is missing, 0700.
        max_bytes: Of all bundles together; what is in use counts, and may be more.
        monotonic: Seconds, for what was used a moment ago and whose user has not said so yet.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._monotonic = monotonic
        self._used: dict[str, float] = {}

    def path_of(self, sha256: str) -> Path:
        """Where a bundle is, or would be."""
        return self._folder / "bundles" / f"{sha256}.tar"

    def recover(self) -> None:
        """Remove what a process that was killed left half done. Raises OSError."""
        for left in self._folder.glob(f"{_WORK}*"):
            shutil.rmtree(left, ignore_errors=True)
        for folder in ("bundles", "commits"):
            for left in (self._folder / folder).glob(".*"):
                left.unlink(missing_ok=True)

    def workspace(self) -> Path:
        """A new empty folder, to fetch into. Raises OSError."""
        work = self._folder / f"{_WORK}{secrets.token_hex(8)}"
        work.mkdir(parents=True, mode=0o700)
        return work

    def find(self, url: str, commit: str) -> str | None:
        """The hash of the bundle of a commit, when it is there and whole."""
        try:
            sha256 = self._index(url, commit).read_text().strip()
            with self.path_of(sha256).open("rb") as bundle:
                whole = hashlib.file_digest(bundle, "sha256").hexdigest() == sha256
            if whole:
                self._note(sha256)
        except (OSError, ValueError):
            return None
        return sha256 if whole else None

    def keep(self, url: str, commit: str, members: Iterable[TreeMember]) -> str:
        """Pack a tree and keep it; returns its hash.

        Raises:
            BundleInvalid: It cannot be a bundle.
            OSError: It cannot be written.
        """
        sha256 = self._written(lambda file: pack_into(file, members))
        self._name(self._index(url, commit), sha256)
        return sha256

    def put(self, bundle: bytes) -> str:
        """Keep a bundle that is no commit's; returns its hash. Raises OSError."""

        def fill(file: IO[bytes]) -> None:
            file.write(bundle)

        return self._written(fill)

    def read(self, sha256: str, path: str, limit: int) -> bytes | None:
        """One file of a bundle, at most `limit` bytes, or None.

        Raises:
            BundleInvalid: It is larger.
            OSError: The bundle cannot be read.
        """
        with self.path_of(sha256).open("rb") as bundle:
            return file_in(bundle, path, limit)

    def evict(self, in_use: Collection[str]) -> list[str]:
        """Remove bundles until the rest fits, never one in use; returns their hashes. Raises OSError."""
        folder = self._folder / "bundles"
        found = []
        for path in folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total, gone = sum(size for _, size, _ in found), []
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                break
            if path.stem in in_use or self._is_fresh(path.stem):
                continue
            path.unlink(missing_ok=True)
            total -= size
            gone.append(path.stem)
        if gone:
            self._unname(set(gone))
        return gone

    def _written(self, fill: Callable[[IO[bytes]], None]) -> str:
        """A new bundle, whole and durable before it has its name; returns its hash."""
        folder = self._folder / "bundles"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = folder / f".{secrets.token_hex(8)}"
        try:
            with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "w+b") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            partial.replace(self.path_of(sha256))
        finally:
            partial.unlink(missing_ok=True)
        self._note(sha256)
        return sha256

    def _index(self, url: str, commit: str) -> Path:
        return self._folder / "commits" / hashlib.sha256(f"{url}\0{commit}".encode()).hexdigest()

    def _note(self, sha256: str) -> None:
        self._used[sha256] = self._monotonic()
        os.utime(self.path_of(sha256))

    def _is_fresh(self, sha256: str) -> bool:
        used = self._used.get(sha256)
        return used is not None and self._monotonic() - used < FRESH

    def _name(self, index: Path, sha256: str) -> None:
        index.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = index.with_name(f".{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(f"{sha256}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(index)
        finally:
            partial.unlink(missing_ok=True)

    def _unname(self, gone: Collection[str]) -> None:
        for index in (self._folder / "commits").iterdir():
            if index.read_text(errors="replace").strip() in gone:
                index.unlink(missing_ok=True)
        for sha256 in gone:
            self._used.pop(sha256, None)
