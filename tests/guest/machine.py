"""Boots the guest image with a program of a test's own as its first process; returns what that printed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from platform_vmm.rootfs import GuestImage
from platform_vmm.rootfs.initrd import INIT, _archive

RESULT = "result: "
_PLACE = "/usr/lib/platform-guest/init"
_MEMORY, _CPUS = "512M", "2"


class MachineFailed(Exception):
    """The virtual machine printed no result; the message is the end of its console."""


def run(image: GuestImage, program: Path, modules: Mapping[str, Path], folder: Path, limit: float) -> Any:
    """Run `program` by the guest's Python as PID 1, with `modules` (name inside to file) importable.

    Returns:
        The JSON after `result: ` on the console.

    Raises:
        MachineFailed: There is none within `limit` seconds.
    """
    initrd = folder / "initrd"
    plain = image.initrd.read_bytes()
    initrd.write_bytes(plain + bytes(-len(plain) % 4) + b"".join(_archive(_files(program, modules))))
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", _CPUS, "-m", _MEMORY]
    command += ["-kernel", str(image.kernel), "-initrd", str(initrd)]
    command += ["-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio"]
    command += ["-drive", f"if=none,id=root,file={image.root},format=raw,readonly=on"]
    command += ["-device", "virtio-blk-pci,drive=root"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False
        )
        console = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        console = (error.stdout or b"") + b"\n(it was ended: its time was over)"
    for line in console.decode(errors="replace").splitlines():
        if RESULT in line:
            return json.loads(line.partition(RESULT)[2])
    raise MachineFailed(console[-4000:].decode(errors="replace"))


def _files(program: Path, modules: Mapping[str, Path]) -> Iterable[tuple[str, int, bytes]]:
    """The initrd's init again, which brings /probe along and starts the program, not the guest's init."""
    begin = "exec $b switch_root /root"
    script = INIT.read_text().replace(f"init={_PLACE}", "init=/probe/init")
    script = script.replace('[ -x "/root$init" ] || ', "$b cp -r /probe /root/probe || ")
    if begin not in script or "/probe/init" not in script:
        raise MachineFailed("the initrd's init is not as expected: adapt tests/guest/machine.py")
    yield "init", 0o100755, script.encode()
    folders = {
        str(parent) for name in modules for parent in Path("probe", name).parents if str(parent) != "."
    }
    for folder in sorted(folders | {"probe"}):
        yield folder, 0o040755, b""
    yield "probe/init", 0o100755, b"#!/usr/bin/python3 -ISB\n" + program.read_bytes()
    for name, path in modules.items():
        yield f"probe/{name}", 0o100644, path.read_bytes()
