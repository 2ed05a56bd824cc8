"""The root filesystem as one archive whose bytes follow from its content alone."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from platform_vmm.rootfs.tree import OWNED, UID

_OPEN = ("tmp", "var/tmp")


class Layer(NamedTuple):
    """An archive on disk: its SHA-256 in hex and its size in bytes, and the same of its content's listing."""

    sha256: str
    size: int
    files: int
    content: str
    """SHA-256 in hex over the sorted list of places with mode and hash: what is inside, however packed."""


def set_modes(root: Path) -> None:
    """Give every file and folder its mode in the image, whatever the umask was; none is setuid."""
    for path, place in _sorted(root):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o1777 if place in _OPEN else 0o755 if executable else 0o644)


def write_layer(root: Path, target: Path) -> Layer:
    """Write `root`, whose modes are set, as a tar archive. Every file is root's but the SDK's user's folders.

    Raises:
        OSError: It could not be written.
    """
    listing = hashlib.sha256()
    count = 0
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for path, place in _sorted(root):
            entry = tarfile.TarInfo(place)
            entry.uid = entry.gid = UID if place in OWNED else 0
            told = place
            if path.is_symlink():
                entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, str(path.readlink()), 0o777
                archive.addfile(entry)
                told += f" -> {entry.linkname}"
            elif path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, path.stat().st_mode & 0o7777
                archive.addfile(entry)
            else:
                status = path.stat()
                entry.mode, entry.size = status.st_mode & 0o7777, status.st_size
                with path.open("rb") as content:
                    archive.addfile(entry, content)
                with path.open("rb") as content:
                    told += f" {hashlib.file_digest(content, 'sha256').hexdigest()}"
                count += 1
            listing.update(f"{entry.mode:o} {entry.uid} {told}\n".encode())
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Layer(digest, target.stat().st_size, count, listing.hexdigest())


def _sorted(root: Path) -> Iterator[tuple[Path, str]]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        here = Path(folder)
        for name in sorted([*files, *folders]):
            yield here / name, str((here / name).relative_to(root))
