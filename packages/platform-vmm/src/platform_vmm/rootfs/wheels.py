"""The libraries that the SDK needs inside: wheels for the image's own Python, by exact hash."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from platform_vmm.rootfs.errors import NoRoom, PackageRefused, ToolMissing, WheelsFailed

LOCK = Path(__file__).with_name("wheels.lock")
PYTHON = "3.11"
"""The image's Python, whatever the VMM's is."""
_GLIBC_MINOR = 36
_FETCH_S = 600.0
_LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, order=True)
class Wheel:
    """One library: exactly one file, by its SHA-256 in hex."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """Its name in the folder of downloads, which is its content's."""
        return f"{self.sha256}.whl"


def read_lock(path: Path = LOCK) -> tuple[Wheel, ...]:
    """The wheels of the lock, sorted."""
    return tuple(sorted(Wheel(*found) for found in _LINE.findall(path.read_text())))


def fetch_wheels(wheels: tuple[Wheel, ...], into: Path, progress: Callable[[str], None]) -> None:
    """Download those of them that `into` has not yet, each checked against its hash.

    Raises:
        ToolMissing: pip is not installed beside the VMM.
        WheelsFailed: The package index does not answer, or lacks one of them.
        PackageRefused: A file's hash is another.
        NoRoom: The disk is full.
    """
    lacking = [wheel for wheel in wheels if not (into / wheel.file).exists()]
    if not lacking:
        return
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolMissing(f"pip is needed to make the image: {sys.executable} -m ensurepip") from error
    progress(f"downloading {len(lacking)} wheels for Python {PYTHON}")
    with tempfile.TemporaryDirectory(prefix=".wheels-", dir=into) as scratch:
        wanted = Path(scratch, "wanted.txt")
        wanted.write_text(
            "".join(f"{one.name}=={one.version} --hash=sha256:{one.sha256}\n" for one in lacking)
        )
        download(wanted, Path(scratch))
        by_hash = {_sha256(path): path for path in Path(scratch).glob("*.whl")}
        for wheel in lacking:
            path = by_hash.get(wheel.sha256)
            if path is None:
                raise PackageRefused(
                    f"{wheel.name} {wheel.version}: expected a wheel of SHA-256 {wheel.sha256}"
                )
            path.rename(into / wheel.file)


def download(requirements: Path, into: Path) -> None:
    """Pip's download of wheels that fit the image's Python, with hashes required.

    Raises:
        WheelsFailed: It failed.
        NoRoom: The disk is full.
    """
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(_GLIBC_MINOR, 4, -1)]
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    words += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--implementation", "cp"]
    words += [
        "--python-version",
        PYTHON,
        "--abi",
        f"cp{PYTHON.replace('.', '')}",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    for tag in [*tags, "manylinux2014_x86_64", "linux_x86_64", "any"]:
        words += ["--platform", tag]
    try:
        done = subprocess.run(
            [*words, "--dest", str(into), "--requirement", str(requirements)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_FETCH_S,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except subprocess.TimeoutExpired as error:
        raise WheelsFailed(f"pip took over {_FETCH_S:g} s") from error
    if done.returncode != 0:
        said = (
            " ".join(line for line in done.stderr.splitlines() if "ERROR" in line)[:800] or done.stderr[-500:]
        )
        if "No space left on device" in done.stderr:
            raise NoRoom(f"{into}: {said}: free some space and try again")
        raise WheelsFailed(
            f"the SDK's libraries could not be had from pip's package index: {said}. "
            "Check this machine's network, or name another index: PIP_INDEX_URL"
        )


def unpack_wheel(path: Path, wheel: Wheel, site: Path) -> None:
    """Unpack its modules into `site`. Programs that it brings are left out: only the SDK is run.

    Raises:
        PackageRefused: The file is another, or would write elsewhere.
    """
    if _sha256(path) != wheel.sha256:
        path.unlink()
        raise PackageRefused(f"{path}: not the file that was downloaded; it was removed, so try again")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            inside = PurePosixPath(entry.filename)
            if inside.is_absolute() or ".." in inside.parts:
                raise PackageRefused(
                    f"{wheel.name}: {entry.filename!r} would be written outside of its folder"
                )
            if not inside.parts[0].endswith(".data"):
                archive.extract(entry, site)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
