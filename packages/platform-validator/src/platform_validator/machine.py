"""What this machine has, and which configured limits promise more: for VMMs that run on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from platform_protocol.resources import Resources

_MIB = 1024**2
_HERE = frozenset({"localhost", "127.0.0.1", "::1"})
_NVIDIA = "0x10de"
_DISPLAY = "0x03"
"""PCI's base class of display controllers, GPUs among them."""


def machine_resources(folder: Path, *, devices: Path = Path("/sys/bus/pci/devices")) -> Resources:
    """CPU cores, memory, the size of the disk that a folder is on, and NVIDIA GPUs.

    `folder` need not be there yet: then its nearest parent counts. `devices` is where the kernel lists PCI.
    """
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return Resources(
        cpu_cores=os.cpu_count() or 1,
        memory_mb=psutil.virtual_memory().total // _MIB,
        disk_mb=psutil.disk_usage(str(there)).total // _MIB,
        gpu_count=sum(_is_gpu(device) for device in devices.glob("*")),
    )


def is_here(url: str) -> bool:
    """Whether a VMM's URL leads to this machine."""
    return url.startswith("unix:") or urlsplit(url).hostname in _HERE


def beyond(limits: Resources, has: Resources) -> Iterator[str]:
    """A line for each limit that is above what the machine has, in the guide's order."""
    for name in ("cpu_cores", "memory_mb", "disk_mb", "gpu_count"):
        limit, there = getattr(limits, name), getattr(has, name)
        if limit > there:
            yield f"{name} = {limit}, and this machine, where the VMM runs, has {there}"


def _is_gpu(device: Path) -> bool:
    try:
        vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
    except OSError:
        return False
    return vendor.strip() == _NVIDIA and kind.startswith(_DISPLAY)
