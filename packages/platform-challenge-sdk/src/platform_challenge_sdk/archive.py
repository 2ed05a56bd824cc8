"""Unpacks a submission inside the CVM: a tar, a tar.gz or a single file. Anything odd is refused by name."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path

from platform_challenge_sdk.errors import SubmissionUnreadable

MAX_ENTRIES = 10_000
MAX_BYTES = 256 * 1024 * 1024
_GZIP = b"\x1f\x8b"
_MAX_PATH = 255
_TAR_MAGIC_AT = 257


def unpack(data: bytes, filename: str, target: Path) -> None:
    """Unpack into `target`, an empty directory; afterwards nothing in it can be written.

    Raises:
        SubmissionUnreadable: Links, devices, FIFOs, setuid, absolute paths, `..`, duplicates, more than
            10,000 entries or 256 MiB, or a broken archive.
    """
    plain = _gunzip(data) if data.startswith(_GZIP) else data
    if plain[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        _untar(plain, target)
    else:
        _write(target / _single_name(filename), plain, executable=False)
    for folder, _, _ in os.walk(target):
        Path(folder).chmod(0o555)


def _gunzip(data: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            plain = stream.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SubmissionUnreadable(f"not a gzip file: {error}") from error
    if len(plain) > MAX_BYTES:
        raise SubmissionUnreadable(f"expected at most {MAX_BYTES} bytes unpacked")
    return plain


def _untar(data: bytes, target: Path) -> None:
    seen: set[str] = set()
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                name = _checked(info)
                if name in seen:
                    raise SubmissionUnreadable(f"{info.name[:200]!r} is there twice")
                seen.add(name)
                total += info.size
                if len(seen) > MAX_ENTRIES or total > MAX_BYTES:
                    raise SubmissionUnreadable(
                        f"expected at most {MAX_ENTRIES} entries and {MAX_BYTES} bytes"
                    )
                if info.isdir():
                    (target / name).mkdir(parents=True, exist_ok=True)
                    continue
                content = tar.extractfile(info)
                _write(target / name, content.read() if content else b"", executable=bool(info.mode & 0o100))
    except tarfile.TarError as error:
        raise SubmissionUnreadable(f"not a tar archive: {error}") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise SubmissionUnreadable(f"a file and a folder share a path: {error.filename}") from error
    except (OSError, ValueError) as error:
        raise SubmissionUnreadable(f"it cannot be written here: {error}") from error


def _checked(info: tarfile.TarInfo) -> str:
    name = info.name.removeprefix("./").rstrip("/")
    shown = info.name[:200]
    if not (info.isreg() or info.isdir()):
        raise SubmissionUnreadable(f"{shown!r} is neither a file nor a folder; links and devices are refused")
    if info.mode & 0o6000:
        raise SubmissionUnreadable(f"{shown!r} is setuid or setgid")
    if info.isdir() and name in ("", "."):
        return "."
    parts = name.split("/")
    if not name or name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise SubmissionUnreadable(f"{shown!r} is no plain relative path")
    if any(len(os.fsencode(part)) > _MAX_PATH for part in parts) or len(os.fsencode(name)) > 4 * _MAX_PATH:
        raise SubmissionUnreadable(f"{shown!r}: the path is too long")
    return name


def _single_name(filename: str) -> str:
    name = filename.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".gz")
    return (
        name
        if name.strip(". ") and "\0" not in name and len(os.fsencode(name)) <= _MAX_PATH
        else "submission"
    )


def _write(path: Path, data: bytes, *, executable: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
    path.chmod(0o555 if executable else 0o444)
