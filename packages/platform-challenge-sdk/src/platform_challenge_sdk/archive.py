"""Unpacks a submission inside the CVM: a tar, a tar.gz or a single file. Anything odd is refused by name.

Everything streams: neither the archive nor a header in it decides how much memory is used.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import unicodedata
import zlib
from pathlib import Path
from typing import IO

from platform_challenge_sdk.errors import SubmissionUnreadable

MAX_ENTRIES = 10_000
MAX_BYTES = 256 * 1024 * 1024
MAX_DEPTH = 32
_MAX_NAME, _MAX_PATH = 255, 1000
_MAX_EXTRA = 64 * 1024
_LENGTH_DIGITS = 6
_CHUNK = 64 * 1024
_GZIP = b"\x1f\x8b"
_MAGIC_AT, _MAGIC = 257, b"ustar"
_BLOCK = tarfile.BLOCKSIZE
_EXTRAS = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
_EXTRAS |= {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}


def unpack(archive: Path, target: Path, single_name: str = "submission") -> None:
    """Unpack into `target`, an empty directory; afterwards nothing in it can be written.

    A file that is no archive becomes `single_name`.

    Raises:
        SubmissionUnreadable: Links, devices, FIFOs, setuid, absolute paths, `..`, duplicates, names that
            differ only in case or in how Unicode spells them, more than 10,000 entries or 256 MiB, deeper
            than 32 folders, or a broken archive.
    """
    try:
        with archive.open("rb") as raw:
            packed = raw.read(len(_GZIP)) == _GZIP
            raw.seek(0)
            if not packed:
                _place(_Counted(raw), target, single_name)
            else:
                with gzip.GzipFile(fileobj=raw) as stream:
                    _place(_Counted(stream), target, single_name)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SubmissionUnreadable(f"not a whole archive: {error}") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise SubmissionUnreadable("a file and a folder share a path") from error
    except (OSError, ValueError) as error:
        raise SubmissionUnreadable(f"it cannot be unpacked here: {error}") from error
    for folder, _, _ in os.walk(target):
        Path(folder).chmod(0o555)


def remove(tree: Path) -> None:
    """Remove what `unpack` made; its folders are read-only, which binds everyone but root."""
    for folder, _, _ in os.walk(tree):
        Path(folder).chmod(0o700)
    shutil.rmtree(tree, ignore_errors=True)


class _Counted:
    """A stream that ends the reading after MAX_BYTES."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._stream = stream
        self._left = MAX_BYTES

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0 and (part := self._stream.read(min(size, _CHUNK))):
            self._left -= len(part)
            size -= len(part)
            if self._left < 0:
                raise SubmissionUnreadable(f"expected at most {MAX_BYTES} bytes unpacked")
            parts.append(part)
        return b"".join(parts)


def _place(stream: _Counted, target: Path, single_name: str) -> None:
    first = stream.read(_BLOCK)
    if first[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC:
        _Tree(target).fill(first, stream)
        return
    with (target / single_name).open("xb") as file:
        file.write(first)
        while chunk := stream.read(_CHUNK):
            file.write(chunk)
    (target / single_name).chmod(0o555 if first.startswith((b"#!", b"\x7fELF")) else 0o444)


class _Tree:
    """The files and folders of a tar, written one after the other."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._named: set[str] = set()
        self._made: set[str] = set()
        self._spelled: dict[str, str] = {}
        """The one spelling of each path: what elsewhere would be one file must not be two here."""

    def fill(self, block: bytes, stream: _Counted) -> None:
        name: str | None = None
        ahead = 0
        while len(block) == _BLOCK and block.count(0) != _BLOCK:
            size, kind = _member_size(block), block[156:157]
            if kind in _EXTRAS:
                ahead += _BLOCK + size
                if ahead > _MAX_EXTRA:
                    raise SubmissionUnreadable(f"a header of over {_MAX_EXTRA} bytes")
                name = _named(kind, _exactly(stream, _padded(size))[:size]) or name
            else:
                self._add(_member(block, name), stream)
                name, ahead = None, 0
            block = stream.read(_BLOCK)
        if ahead or 0 < len(block) < _BLOCK:
            raise SubmissionUnreadable("not a whole archive: it ends in the middle of a header")

    def _add(self, info: tarfile.TarInfo, stream: _Counted) -> None:
        name = _checked(info)
        if name in self._named:
            raise SubmissionUnreadable(f"{info.name[:200]!r} is there twice")
        self._named.add(name)
        self._spell(name)
        path = self._target / name
        self._make_folders(name if info.isdir() else str(Path(name).parent))
        if info.isdir():
            return
        with path.open("xb") as file:
            left = info.size
            while left:
                chunk = _exactly(stream, min(left, _CHUNK))
                file.write(chunk)
                left -= len(chunk)
        _exactly(stream, _padded(info.size) - info.size)
        path.chmod(0o555 if info.mode & 0o111 else 0o444)

    def _spell(self, name: str) -> None:
        folded = ""
        for at, part in enumerate(parts := name.split("/"), 1):
            folded += "/" + unicodedata.normalize("NFC", unicodedata.normalize("NFD", part).casefold())
            exact = "/".join(parts[:at])
            if self._spelled.setdefault(folded, exact) != exact:
                raise SubmissionUnreadable(f"{name[:200]!r} and {self._spelled[folded][:200]!r} collide")

    def _make_folders(self, name: str) -> None:
        folder = Path(name)
        for each in (*reversed(folder.parents), folder):
            if str(each) not in self._made:
                self._made.add(str(each))
                (self._target / each).mkdir(exist_ok=True)
        if len(self._named) + len(self._made) > MAX_ENTRIES:
            raise SubmissionUnreadable(f"expected at most {MAX_ENTRIES} entries")


def _member(block: bytes, name: str | None) -> tarfile.TarInfo:
    """What a member's header says, under the longer name that came before it."""
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if name is not None:
        info.name = name
    return info


def _named(kind: bytes, data: bytes) -> str | None:
    """The name that an extra header gives to the next member.

    Read here and not by tarfile, whose expressions take a time that grows with the square of their input.
    """
    if kind == tarfile.GNUTYPE_LONGLINK:
        return None
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    path, at = None, 0
    while at < len(data) and data[at]:
        length = data[at : at + _LENGTH_DIGITS].partition(b" ")[0]
        end = at + int(length) if length.isdigit() else 0
        key, equals, value = data[at + len(length) + 1 : end].partition(b"=")
        if not equals or end > len(data) or not value.endswith(b"\n"):
            raise SubmissionUnreadable("a header that is none")
        if key == b"size" or key.startswith(b"GNU.sparse.") or (key == b"path" and kind == tarfile.XGLTYPE):
            raise SubmissionUnreadable("a header that contradicts the next one")
        if key == b"path":
            path = value[:-1].decode("utf-8", "surrogateescape")
        at = end
    return path


def _member_size(block: bytes) -> int:
    size = tarfile.nti(block[124:136])  # type: ignore[attr-defined]  # octal or GNU's base 256, as tarfile has it
    if size < 0 or (block[156:157] == tarfile.DIRTYPE and size):
        raise SubmissionUnreadable("a member of impossible size")
    return int(size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _exactly(stream: _Counted, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise SubmissionUnreadable("not a whole archive: it ends in the middle of a member")
    return data


def _checked(info: tarfile.TarInfo) -> str:
    name = info.name.removeprefix("./").rstrip("/")
    shown = info.name[:200]
    plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and not info.issparse()
    if not plain:
        raise SubmissionUnreadable(f"{shown!r} is neither a file nor a folder; links and devices are refused")
    if info.mode & 0o6000:
        raise SubmissionUnreadable(f"{shown!r} is setuid or setgid")
    if info.isdir() and name in ("", "."):
        return "."
    parts = name.split("/")
    if not name or name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise SubmissionUnreadable(f"{shown!r} is no plain relative path")
    if any(len(os.fsencode(part)) > _MAX_NAME for part in parts) or len(os.fsencode(name)) > _MAX_PATH:
        raise SubmissionUnreadable(f"{shown!r}: the path is too long")
    if len(parts) > MAX_DEPTH:
        raise SubmissionUnreadable(f"{shown!r} is deeper than {MAX_DEPTH} folders")
    return name
