"""From packages, wheels and the SDK to a root filesystem and its OCI image: the same in, the same out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from platform_vmm.distributions import walk
from platform_vmm.rootfs.apt import Apt
from platform_vmm.rootfs.layer import Layer, set_modes, write_layer
from platform_vmm.rootfs.oci import Layout, write_layout
from platform_vmm.rootfs.packages import SUITE, Package, Selection
from platform_vmm.rootfs.tree import (
    OWN,
    UID,
    compile_modules,
    install_sdk,
    run_python,
    sdk_files,
    unpack_packages,
)
from platform_vmm.rootfs.wheels import PYTHON, Wheel, fetch_wheels

NAME = "platform-runtime"
MANIFEST = "platform-runtime.json"
"""Beside the layout's index: what the image is made of."""
_GUEST_FILES = Path(__file__).parents[1] / "qemu" / "guest"
_COMPRESS_S = 300.0
_COMPRESS = (
    "import gzip, shutil, sys\n"
    "with open(sys.argv[1], 'rb') as plain, open(sys.argv[2], 'wb') as file:\n"
    "    with gzip.GzipFile('', 'wb', 6, file, mtime=0) as packed:\n"
    "        shutil.copyfileobj(plain, packed, 1 << 20)\n"
)


class Assembled(NamedTuple):
    """What was made: the root as a folder, and the OCI layout of it."""

    root: Path
    layout: Layout


@dataclass(frozen=True, slots=True)
class Materials:
    """All that goes in, but for the SDK, the guest's files and these scripts, which are as they are here."""

    packages: Selection
    wheels: tuple[Wheel, ...]

    @property
    def key(self) -> str:
        """Forty hex digits that change with anything that goes in, the kernel and our scripts included."""
        guest = [(place, os.access(path, os.X_OK), _sha256(path)) for path, place in walk(_GUEST_FILES)]
        scripts = [(place, _sha256(path)) for path, place in walk(Path(__file__).parent)]
        made_of = [
            self.packages.to_json(),
            [asdict(one) for one in self.wheels],
            sdk_sha256(),
            guest,
            scripts,
        ]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:40]

    def fetch(self, downloads: Path, progress: Callable[[str], None], *, old: bool = False) -> None:
        """Download what is not in `downloads` yet; what is damaged there is fetched again.

        Raises:
            ImageNotBuilt: Something could not be had.
        """
        kept: list[Package | Wheel] = [*self.packages.all, *self.wheels]
        for one in kept:
            path = downloads / one.file
            if path.exists() and _sha256(path) != one.sha256:
                progress(f"{one.name}: the file that was kept is damaged")
                path.unlink()
        if any(not (downloads / one.file).exists() for one in self.packages.all):
            with Apt(downloads, old=old) as apt:
                apt.fetch(self.packages.all, downloads, progress)
        fetch_wheels(self.wheels, downloads, progress)

    def told(self, digest: str, layer: Layer) -> dict[str, Any]:
        """What `platform-runtime.json` says."""
        return {
            "content": {"files": layer.files, "sha256": layer.content, "tar_bytes": layer.size},
            "digest": digest,
            "kernel": asdict(self.packages.kernel),
            "packages": [asdict(one) for one in self.packages.root],
            "python": PYTHON,
            "sdk": {"sha256": sdk_sha256(), "versions": _versions()},
            "suite": SUITE,
            "wheels": [asdict(one) for one in self.wheels],
        }

    def assemble(self, downloads: Path, scratch: Path, progress: Callable[[str], None]) -> Assembled:
        """Make root filesystem and OCI layout in `scratch`, from what was fetched.

        Raises:
            ImageNotBuilt: Its subclasses say why.
            ImageUnknown: The SDK is not installed beside the VMM.
            OSError: It could not be written.
        """
        root, tar, packed = scratch / "root", scratch / "layer.tar", scratch / "layer.tar.gz"
        root.mkdir()
        progress(f"unpacking {len(self.packages.root)} packages")
        unpack_packages(self.packages.root, downloads, root)
        install_sdk(self.wheels, downloads, _GUEST_FILES, root)
        progress("compiling Python modules")
        compile_modules(root)
        progress("packing the root filesystem")
        set_modes(root)
        layer = write_layer(root, tar)
        # The image's own Python compresses: another zlib would make other bytes, and so another digest.
        run_python(root, ["-c", _COMPRESS, str(tar), str(packed)], timeout=_COMPRESS_S)
        layout = write_layout(
            scratch / "oci", layer=packed, content_sha256=layer.sha256, run=_configuration(), name=NAME
        )
        text = json.dumps(self.told(layout.digest, layer), indent=1, sort_keys=True)
        (scratch / "oci" / MANIFEST).write_text(text + "\n")
        tar.unlink()
        return Assembled(root, layout)


def sdk_sha256() -> str:
    """SHA-256 in hex over the places and hashes of the files of the SDK and the protocol.

    Raises:
        ImageUnknown: They are not installed beside the VMM.
    """
    lines = "".join(f"{place} {_sha256(path)}\n" for path, place in sdk_files())
    return hashlib.sha256(lines.encode()).hexdigest()


def _configuration() -> dict[str, Any]:
    """No Entrypoint: a compose file's `command` replaces Cmd, and is `platform-boot` as well."""
    return {
        "Cmd": ["platform-boot"],
        "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin", "HOME=/root", "LANG=C.UTF-8"],
        "Labels": {
            "org.opencontainers.image.title": NAME,
            "org.opencontainers.image.version": _versions()["platform-challenge-sdk"],
        },
        "User": str(UID),
        "WorkingDir": "/root",
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in OWN}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
