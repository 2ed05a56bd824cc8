"""What the driver needs of a guest image on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class GuestImage:
    """The image's folder and, in it, its three files."""

    path: Path
    kernel: Path
    initrd: Path
    root: Path
    digest: str
    boot: tuple[str, ...]
    """What a command `platform-boot` becomes inside."""
    library: str
    """Where inside the guest's Python finds the SDK: its PYTHONPATH."""
