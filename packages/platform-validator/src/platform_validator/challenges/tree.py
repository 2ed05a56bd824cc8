"""What `git ls-tree` says of an untrusted tree, judged before a byte of a file is read; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from platform_validator.challenges.source import SourceError

MAX_FILES = 20_000
MAX_LISTING = 32 * 1024 * 1024
MAX_PLATFORM_TOML = 256 * 1024
LINK = "120000"
EXECUTABLE = "100755"
# The size is '-' for what is no file, and BAD where the server left the file out for its size.
_LISTED = re.compile(rb"(\d{6}) (\w+) ([0-9a-f]+) +(\d+|-|BAD)\t(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Blob:
    """A file or link of a tree: git's mode, its object and its size in bytes."""

    mode: str
    object_id: str
    size: int
    path: str


def refused(message: str) -> SourceError:
    """A tree that cannot be a bundle, whoever tries."""
    return SourceError("tree_refused", message, lasting=True)


def judge_listing(listing: bytes, max_bytes: int) -> Sequence[Blob]:
    """The files of a tree, from `git ls-tree -r -z -l`.

    Raises:
        SourceError: `tree_refused` (a submodule, a path that is no UTF-8, over 20,000 files or `max_bytes`),
            `platform_toml_invalid` (over 256 KiB), `no_platform_toml`, `git_failed`.
    """
    lines = listing.split(b"\0")[:-1]
    if len(lines) > MAX_FILES:
        raise refused(f"the tree has over {MAX_FILES} files")
    found, total = [], 0
    for line in lines:
        blob = _blob(line, max_bytes)
        total += blob.size
        if total > max_bytes:
            raise refused(f"the tree is larger than {max_bytes} bytes; {blob.path!r} has {blob.size}")
        found.append(blob)
    _check_platform_toml(found)
    return found


def _blob(line: bytes, max_bytes: int) -> Blob:
    match = _LISTED.fullmatch(line)
    if match is None:
        raise SourceError("git_failed", f"git ls-tree said {line[:80]!r}")
    mode, kind, object_id, size, path = (part.decode(errors="surrogateescape") for part in match.groups())
    if kind != "blob":
        raise refused(f"{path!r} is a submodule: they are not fetched; put its files into the tree")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise refused(f"a path is no UTF-8: {path!r}") from None
    if size == "BAD":
        raise refused(f"{path!r} is larger than {max_bytes} bytes, which is the limit for the whole tree")
    return Blob(mode, object_id, int(size), path)


def _check_platform_toml(found: Sequence[Blob]) -> None:
    for blob in found:
        if blob.path == "platform.toml" and blob.mode != LINK:
            if blob.size > MAX_PLATFORM_TOML:
                raise SourceError(
                    "platform_toml_invalid",
                    f"platform.toml: expected at most {MAX_PLATFORM_TOML} bytes, got {blob.size}",
                    lasting=True,
                )
            return
    raise SourceError("no_platform_toml", "the tree has no platform.toml at its root", lasting=True)
