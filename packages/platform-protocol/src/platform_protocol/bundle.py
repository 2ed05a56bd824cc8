"""A challenge's tree as one file: an uncompressed ustar that is the same for the same tree, everywhere.

Paths sorted by bytes, mtime 0, uid and gid 0, no names, modes 0644 or 0755, symlinks only inside the
tree, no .git. Only regular files and symlinks are written; folders follow from paths.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO

from platform_protocol.errors import ProtocolError

MAX_BUNDLE_BYTES = 1024 * 1024 * 1024
MAX_ENTRIES = 100_000
_MAX_PATH = 255
_MAX_LINK = 100


class BundleInvalid(ProtocolError):
    """A tree that cannot be bundled, or bytes that are no bundle of ours; the message names the path."""


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """A file (`data`) or a symlink (`link`, its target) at a relative POSIX path."""

    path: str
    data: bytes = b""
    link: str | None = None
    executable: bool = False


@dataclass(frozen=True, slots=True)
class TreeMember:
    """The same, with the bytes of a file elsewhere: `size` of them are read from `content` when packed."""

    path: str
    size: int = 0
    content: Callable[[], IO[bytes]] = io.BytesIO
    link: str | None = None
    executable: bool = False


def pack(entries: Iterable[TreeEntry]) -> bytes:
    """The bundle of a tree, in any order of entries.

    Raises:
        BundleInvalid: A path that is absolute, has `..` or control characters, is under .git, too long, twice
            there or also a folder; a link that leaves the tree; more than 100,000 entries or 1 GiB.
    """
    out = io.BytesIO()
    pack_into(out, [_member(entry) for entry in entries])
    return out.getvalue()


def pack_into(out: IO[bytes], members: Iterable[TreeMember]) -> None:
    """Write the bundle of a tree to a file, one member's bytes at a time.

    Raises:
        BundleInvalid: As `pack`; nothing was written then, except where a path does not fit into a header.
        OSError: It cannot be written, or a content ends too soon.
    """
    ordered = sorted(members, key=lambda member: member.path.encode())
    _check(ordered)
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member in ordered:
            info = tarfile.TarInfo(member.path)
            info.mode = 0o755 if member.executable else 0o644
            if member.link is None:
                info.size = member.size
            else:
                info.type, info.linkname = tarfile.SYMTYPE, member.link
            try:
                tar.addfile(info, member.content() if member.link is None else None)
            except (ValueError, UnicodeEncodeError) as error:
                raise BundleInvalid(f"{member.path!r} does not fit into a ustar header: {error}") from error


def _member(entry: TreeEntry) -> TreeMember:
    return TreeMember(
        entry.path, len(entry.data), lambda: io.BytesIO(entry.data), entry.link, entry.executable
    )


def file_in(bundle: IO[bytes], path: str, limit: int) -> bytes | None:
    """One regular file of a bundle that was checked before, or None; the others are not read.

    Raises:
        BundleInvalid: Not a tar, or the file is larger than `limit` bytes.
    """
    try:
        with tarfile.open(fileobj=bundle, mode="r:") as tar:
            for info in tar:
                content = tar.extractfile(info) if info.name == path and info.isreg() else None
                if content is None:
                    continue
                if info.size > limit:
                    raise BundleInvalid(f"{path!r}: expected at most {limit} bytes, got {info.size}")
                return content.read()
    except (tarfile.TarError, ValueError, OSError) as error:
        raise BundleInvalid(f"not a ustar archive: {error}") from error
    return None


def unpack(data: bytes) -> list[TreeEntry]:
    """The entries of a bundle, checked like `pack` checks them.

    Raises:
        BundleInvalid: Not a tar, or an entry that `pack` would not have written.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise BundleInvalid(f"expected at most {MAX_BUNDLE_BYTES} bytes, got {len(data)}")
    entries: list[TreeEntry] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                entries.append(_entry(tar, info))
                if len(entries) > MAX_ENTRIES:
                    raise BundleInvalid(f"expected at most {MAX_ENTRIES} entries")
    except (tarfile.TarError, ValueError, OSError) as error:
        raise BundleInvalid(f"not a ustar archive: {error}") from error
    _check([_member(entry) for entry in entries])
    return entries


def _entry(tar: tarfile.TarFile, info: tarfile.TarInfo) -> TreeEntry:
    executable = bool(info.mode & 0o100)
    if info.issym():
        return TreeEntry(info.name, link=info.linkname, executable=executable)
    content = tar.extractfile(info) if info.isreg() else None
    if content is None:
        raise BundleInvalid(f"{info.name!r} is neither a file nor a symlink")
    return TreeEntry(info.name, content.read(), executable=executable)


def _check(entries: Sequence[TreeMember]) -> None:
    if len(entries) > MAX_ENTRIES:
        raise BundleInvalid(f"expected at most {MAX_ENTRIES} entries, got {len(entries)}")
    if sum(entry.size for entry in entries) > MAX_BUNDLE_BYTES:
        raise BundleInvalid(f"expected at most {MAX_BUNDLE_BYTES} bytes of files")
    seen: set[str] = set()
    for entry in entries:
        _check_path(entry.path)
        if entry.path in seen:
            raise BundleInvalid(f"{entry.path!r} is there twice")
        seen.add(entry.path)
        if entry.link is not None:
            _check_link(entry.path, entry.link)
    for path in seen:
        parent = posixpath.dirname(path)
        while parent:
            if parent in seen:
                raise BundleInvalid(f"{parent!r} is a file or link, and {path!r} is below it")
            parent = posixpath.dirname(parent)


def _check_path(path: str) -> None:
    parts = path.split("/")
    if not path or len(path.encode()) > _MAX_PATH or "\0" in path:
        raise BundleInvalid(f"expected a path of 1 to {_MAX_PATH} bytes without NUL, got {path[:80]!r}")
    if any(unicodedata.category(character) == "Cc" for character in path):
        raise BundleInvalid(f"expected a path without control characters, got {path!r}")
    if any(part in ("", ".", "..") for part in parts):
        raise BundleInvalid(f"expected a relative path without '.', '..' or empty parts, got {path!r}")
    if ".git" in parts:
        raise BundleInvalid(f"{path!r} is git's own and not part of the tree")


def _check_link(path: str, target: str) -> None:
    if not target or len(target.encode()) > _MAX_LINK or "\0" in target or target.startswith("/"):
        raise BundleInvalid(f"the link {path!r} needs a relative target of 1 to {_MAX_LINK} bytes")
    aim = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    if aim == ".." or aim.startswith(("../", "/")):
        raise BundleInvalid(f"the link {path!r} leaves the tree: {target!r}")
