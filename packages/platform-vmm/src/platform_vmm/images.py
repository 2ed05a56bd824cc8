"""The table of images, and the runtime image `platform-runtime`: this Python with the SDK, by content."""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from platform_vmm.distributions import closure, distribution_files, walk
from platform_vmm.errors import ImageUnknown
from platform_vmm.state import write_durably

RUNTIME = "platform-runtime"
IMAGE = "local-sandbox"
_SDK = "platform-challenge-sdk"
_LAYOUT = 1


@dataclass(frozen=True, slots=True)
class Runtime:
    """A runtime on disk. `digest` is `sha256:…` over its distributions, versions and file hashes."""

    name: str
    digest: str
    path: Path
    boot: tuple[str, ...]
    """What a command `platform-boot` becomes inside."""
    library: str = ""
    """Where inside the guest's Python finds the SDK: its PYTHONPATH."""


class RuntimeTable:
    """Runtimes by name: what a compose file's image is looked up in."""

    def __init__(self, runtimes: list[Runtime]) -> None:
        self._runtimes = {runtime.name: runtime for runtime in runtimes}

    def digests(self) -> dict[str, str]:
        """Name to digest, as ListImages shows them."""
        return {name: runtime.digest for name, runtime in sorted(self._runtimes.items())}

    def find(self, name: str, digest: str) -> Runtime:
        """The runtime of that name and digest.

        Raises:
            ImageUnknown: No such name, or another digest.
        """
        runtime = self._runtimes.get(name)
        if runtime is None:
            raise ImageUnknown(
                f"image {name!r}: not in the local table ({', '.join(sorted(self._runtimes))})"
            )
        if runtime.digest != digest:
            raise ImageUnknown(f"image {name!r}: the local table has {runtime.digest}, asked for {digest}")
        return runtime


def build_runtime(state: Path, progress: Callable[[str], None] = lambda _: None) -> Runtime:
    """The runtime image under `state/images`, built when it is not there yet (some seconds, some 60 MB).

    Raises:
        ImageUnknown: The SDK is not installed beside the VMM.
        OSError: It could not be written; nothing half-done is left.
    """
    images = state / "images"
    images.mkdir(mode=0o700, exist_ok=True)
    sources = list(_sources())
    stamp = hashlib.sha256(
        json.dumps(
            [
                _LAYOUT,
                sys.version,
                [(str(p), to, p.stat().st_size, p.stat().st_mtime_ns) for p, to in sources],
            ]
        ).encode()
    ).hexdigest()
    note = images / f"{stamp}.digest"
    if not note.exists():
        progress("building the runtime image (this Python with the SDK)")
        digest = _digest(sources)
        target = images / digest.removeprefix("sha256:")
        if not target.exists():
            _copy(sources, images, target)
        write_durably(note, digest, 0o644)
    digest = note.read_text()
    python = f"bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return Runtime(
        name=RUNTIME,
        digest=digest,
        path=images / digest.removeprefix("sha256:"),
        boot=(f"/opt/platform/{python}", "-m", "platform_challenge_sdk.boot"),
        library=f"/opt/platform/lib/{Path(python).name}/site-packages",
    )


def prune_images(state: Path, keep: Runtime) -> None:
    """Remove images that nothing can start any more, and what a crash left half-built."""
    for entry in (state / "images").iterdir():
        if entry.name == "guest":
            continue  # what guests of QEMU boot from is pruned on its own (`rootfs`)
        if entry.is_dir() and entry != keep.path:
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.suffix == ".digest" and entry.read_text().strip() != keep.digest:
            entry.unlink()


def _sources() -> Iterator[tuple[Path, str]]:
    """(file, place in the image): interpreter, standard library, the SDK and all that it needs."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    yield Path(sys.executable).resolve(), f"bin/{version}"
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path, relative in walk(stdlib):
        yield path, f"lib/{version}/{relative}"
    for library in sorted(Path(sys.base_prefix, "lib").glob(f"lib{version}*.so*")):
        if Path(sys.base_prefix) != Path("/usr"):
            yield library.resolve(), f"lib/{library.name}"
    for name in sorted(closure(_SDK)):
        for path, relative in distribution_files(name):
            yield path, f"lib/{version}/site-packages/{relative}"


def _digest(sources: list[tuple[Path, str]]) -> str:
    lines = [f"{name} {importlib.metadata.version(name)}" for name in sorted(closure(_SDK))]
    lines += sorted(f"{to} {hashlib.sha256(_content(path, to)).hexdigest()}" for path, to in sources)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _content(path: Path, to: str) -> bytes:
    """A file as the image has it: an interpreter finds its libpython beside itself, wherever it was built.

    Else it would run with whatever libpython of that name the system has, and the wrong standard library.
    """
    data = path.read_bytes()
    built, beside = f"\0{sys.base_prefix}/lib\0".encode(), b"\0$ORIGIN/../lib"
    if to.startswith("bin/") and built in data and len(beside) < len(built):
        data = data.replace(built, beside.ljust(len(built), b"\0"))
    return data


def _copy(sources: list[tuple[Path, str]], images: Path, target: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=images))
    try:
        for path, to in sources:
            place = scratch / to
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(_content(path, to))
            shutil.copystat(path, place)
            place.chmod(0o755 if os.access(path, os.X_OK) else 0o644)
            compiled = Path(importlib.util.cache_from_source(str(path))) if path.suffix == ".py" else path
            if compiled != path and compiled.exists():
                (place.parent / "__pycache__").mkdir(exist_ok=True)
                shutil.copyfile(compiled, place.parent / "__pycache__" / compiled.name)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        compileall.compile_dir(scratch / "lib" / version / "site-packages", quiet=2, stripdir=str(scratch))
        etc = scratch / "etc"
        etc.mkdir()
        (etc / "passwd").write_text("vm:x:1000:1000::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
        (etc / "group").write_text("vm:x:1000:\nnogroup:x:65534:\n")
        (etc / "hosts").write_text("127.0.0.1 localhost vm\n")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        for folder, _, _ in os.walk(scratch):
            Path(folder).chmod(0o755)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
