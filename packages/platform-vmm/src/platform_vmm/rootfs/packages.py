"""Which Debian packages the root filesystem and its kernel are made of, in which exact versions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from platform_vmm.rootfs.errors import PackageRefused

SUITE = "bookworm"
"""Debian 12: its Python 3.11 is what the SDK is locked for."""
ARCHITECTURE = "amd64"
WANTED = {
    "base-files": "the folders, os-release",
    "busybox-static": "the shell, and what a guest's init needs of Unix: mount, ip, poweroff",
    "bubblewrap": "the SDK contains submissions with it",
    "ca-certificates": "a challenge that may go out verifies whom it reaches",
    "nftables": "the second wall around a guest's service: a packet filter",
    "python3.11": "the SDK, challenges and submissions run on it",
}
"""Name to reason. What they depend on comes with them, but for `UNUSED`."""
UNUSED = {
    "debconf": "asks questions of maintainer scripts; none is run",
    "dpkg": "nothing is installed inside",
    "gcc-12-base": "a folder of documents",
    "mawk": "for maintainer scripts",
    "openssl": "only update-ca-certificates needs it; its library is a package of its own",
    "readline-common": "the settings of interactive prompts",
    "tar": "for dpkg",
}
KERNEL = "linux-image-cloud-amd64"
"""The name that depends on Debian's newest kernel for virtual machines."""


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """One .deb. `size` in bytes; `sha256` in hex, as the signed package index has it."""

    name: str
    version: str
    architecture: str
    size: int
    sha256: str

    @property
    def file(self) -> str:
        """Its name in the folder of downloads, which is its content's."""
        return f"{self.sha256}.deb"


@dataclass(frozen=True, slots=True)
class Selection:
    """The packages of the root filesystem, sorted, and the kernel's, which is not in it."""

    root: tuple[Package, ...]
    kernel: Package

    @property
    def all(self) -> tuple[Package, ...]:
        """Every package that is needed."""
        return (*self.root, self.kernel)

    @property
    def release(self) -> str:
        """What the kernel calls itself."""
        return self.kernel.name.removeprefix("linux-image-")

    def to_json(self) -> str:
        """One line a package, so that two selections can be compared by eye."""
        lines = ",\n".join("    " + json.dumps(asdict(one)) for one in self.root)
        return f'{{\n  "kernel": {json.dumps(asdict(self.kernel))},\n  "root": [\n{lines}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, or the `packages` and `kernel` of an image's manifest.

        Raises:
            PackageRefused: It is something else.
        """
        try:
            document = json.loads(text)
            listed = document["root"] if "root" in document else document["packages"]
            root = tuple(sorted(Package(**one) for one in listed))
            return cls(root, Package(**document["kernel"]))
        except (ValueError, TypeError, KeyError) as error:
            raise PackageRefused(f"expected a list of packages with versions and hashes: {error}") from error
