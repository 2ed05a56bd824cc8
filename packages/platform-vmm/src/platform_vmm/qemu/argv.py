"""QEMU's command line, and the sandbox it runs in, as functions of the decided virtual machine. Pure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from platform_vmm.qemu.guest.exchange import BROKER, SERVICE
from platform_vmm.sandbox.recipe import IMAGE, MIB, Recipe

PROGRAM = "qemu-system-x86_64"
PORT = "/run/dstack.sock"
"""Where QEMU finds the VMM's end of the control port, in its sandbox."""
CACHE_MIB = 64
"""Translated code that the emulator keeps, at most; without a bound it takes as much as it likes."""
OVERHEAD = 192 * MIB
"""What QEMU takes besides the guest's memory, before _EACH_CPU and _PAGE_TABLES.

Measured with QEMU 7.2 under TCG, all of the guest's memory in use and CACHE_MIB full, as what the control
group counted beyond that memory: 109 and 110 MiB for 256 and 512 MiB with 1 processor, 115 for 1 GiB with 2,
122 for 2 GiB with 4. To that come 31 MiB of the program's own files where no other QEMU has them in memory.
The rest is for the buffers of connections. Under KVM nothing is translated, and it takes less.
"""
_EACH_CPU = 4 * MIB
"""Tables of one more processor's emulation."""
_PAGE_TABLES = 512
"""The host's page tables take one byte for so many of the guest's memory."""
_SCRATCH = 16 * MIB
_THREADS = 64
_FORBIDDEN = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_COMMAND_LINE = "console=ttyS0 quiet panic=-1 random.trust_cpu=on"


@dataclass(frozen=True, slots=True)
class VirtualMachine:
    """One virtual machine. `kernel`, `initrd` and `root` are names of files in the image's folder.

    Attributes:
        memory_bytes: The machine's memory.
        cpus: Virtual processors.
        kvm: Whether the processor runs the guest itself; else it is emulated (TCG).
        processor: Which one the guest sees under KVM.
        networked: Whether there are a network device and a control port.
        more: What else the kernel is told.
    """

    kernel: str
    initrd: str
    root: str
    memory_bytes: int
    cpus: int
    kvm: bool
    networked: bool = True
    processor: str = "host"
    more: str = ""

    @property
    def overhead_bytes(self) -> int:
        """What QEMU may take besides the machine's memory."""
        return OVERHEAD + (self.cpus - 1) * _EACH_CPU + self.memory_bytes // _PAGE_TABLES

    def recipe(self, image: Path, shared: Path, devices: Sequence[str] = ()) -> Recipe:
        """The sandbox around QEMU: the image, the control port's socket in `shared`, no port, no network."""
        return Recipe(
            command=self.arguments(),
            environment={"PATH": os.defpath, "HOME": "/root"},
            image=image,
            shared=shared,
            memory_bytes=self.memory_bytes + self.overhead_bytes,
            disk_bytes=_SCRATCH,
            cpus=self.cpus,
            pids=_THREADS + self.cpus,
            devices=devices,
        )

    def arguments(self) -> list[str]:
        """The whole command."""
        words = [PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += ["-sandbox", _FORBIDDEN, "-machine", "q35,usb=off,vmport=off,smm=off"]
        if self.kvm:
            words += ["-accel", "kvm", "-cpu", self.processor]
        else:
            words += ["-accel", f"tcg,thread=multi,tb-size={CACHE_MIB}", "-cpu", "max"]
        words += ["-smp", str(self.cpus), "-m", f"{self.memory_bytes // MIB}M"]
        words += ["-kernel", f"{IMAGE}/{self.kernel}", "-initrd", f"{IMAGE}/{self.initrd}"]
        words += ["-append", f"{_COMMAND_LINE} {self.more}".strip()]
        words += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        root = f"if=none,id=root,file={IMAGE}/{self.root},format=raw,readonly=on"
        words += ["-drive", root, "-device", "virtio-blk-pci,drive=root"]
        words += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]
        return words + self._network() if self.networked else words

    def _network(self) -> list[str]:
        """One way in, none out; and the control port."""
        forward = f"hostfwd=tcp:{SERVICE}:{BROKER}-{SERVICE}:{BROKER}"
        words = ["-netdev", f"user,id=net,restrict=on,ipv6=off,{forward}"]
        words += ["-device", "virtio-net-pci,netdev=net,romfile="]
        words += ["-chardev", f"socket,id=port,path={PORT}", "-device", "virtio-serial-pci"]
        return [*words, "-device", "virtserialport,chardev=port,name=platform"]
