"""Whether this machine's KVM really runs our guests: found by booting one, and remembered.

A /dev/kvm that can be opened proves nothing: under nested virtualisation a guest may crawl, hang, or stop
with an internal error that QEMU does not even exit on. Only a guest that reached user space in time counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from platform_vmm.errors import SandboxFailed
from platform_vmm.qemu.argv import PROGRAM, VirtualMachine
from platform_vmm.qemu.guest.machine import ALIVE, PROBE
from platform_vmm.rootfs.image import GuestImage
from platform_vmm.sandbox.driver import Sandbox, SandboxDriver
from platform_vmm.sandbox.recipe import MIB
from platform_vmm.state import write_durably

KVM = Path("/dev/kvm")
PATIENCE = 10.0
"""Seconds that the probe has; where KVM works it takes about one."""
_MEMORY = 256 * MIB
_LOOK = 0.05
_NOTE = "accelerator.json"
_VERSION_TIMEOUT = 10.0
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """`kvm`: the processor runs guests itself; else it is emulated (TCG). `why` is for people."""

    kvm: bool
    why: str

    @property
    def name(self) -> str:
        """QEMU's."""
        return "kvm" if self.kvm else "tcg"


async def find_accelerator(
    sandboxes: SandboxDriver,
    image: GuestImage,
    folder: Path,
    *,
    uid: int,
    device: Path = KVM,
    patience: float = PATIENCE,
) -> Accelerator:
    """The answer in `folder` if it is about this kernel, QEMU, processor and boot; else a fresh one."""
    if not device.exists():
        return Accelerator(kvm=False, why=f"{device} is not there")
    note = folder / _NOTE
    key = await _key(image)
    kept = last_answer(folder, key)
    if kept is not None:
        return kept
    found = await probe(sandboxes, image, folder, uid=uid, device=device, patience=patience)
    write_durably(note, json.dumps({"key": key} | asdict(found)), 0o644)
    log.info("accelerator_probed", accelerator=found.name, why=found.why)
    return found


def last_answer(folder: Path, key: str | None = None) -> Accelerator | None:
    """What is remembered there, if it is about `key` (None: whatever it is about)."""
    try:
        value = json.loads((folder / _NOTE).read_text())
        if key in (None, value["key"]):
            return Accelerator(kvm=bool(value["kvm"]), why=str(value["why"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


async def probe(
    sandboxes: SandboxDriver,
    image: GuestImage,
    folder: Path,
    *,
    uid: int,
    device: Path = KVM,
    patience: float = PATIENCE,
    processor: str = "host",
) -> Accelerator:
    """Boot a guest under KVM, with `processor` as QEMU's -cpu, and see whether its user space shows up."""
    log_file = folder / "accelerator.log"
    log_file.unlink(missing_ok=True)
    (folder / "probe").mkdir(mode=0o700, exist_ok=True)
    (folder / "probe" / "dstack.sock").touch()
    machine = VirtualMachine(
        kernel=image.kernel.name,
        initrd=image.initrd.name,
        root=image.root.name,
        memory_bytes=_MEMORY,
        cpus=1,
        kvm=True,
        networked=False,
        processor=processor,
        more=PROBE,
    )
    recipe = machine.recipe(image.path, folder / "probe", devices=[str(device)])
    began = time.monotonic()
    try:
        sandbox = await sandboxes.start("accelerator-probe", recipe, uid=uid, log=log_file, forwards=[])
    except SandboxFailed as error:
        return Accelerator(kvm=False, why=str(error))
    try:
        alive = await _alive(sandbox, log_file, patience)
    finally:
        await sandbox.destroy()
        shutil.rmtree(folder / "probe", ignore_errors=True)
    took = time.monotonic() - began
    if alive is None:
        return Accelerator(kvm=True, why=f"a guest was up after {took:.1f} s under KVM")
    return Accelerator(kvm=False, why=f"no guest comes up under KVM: {alive}")


async def _alive(sandbox: Sandbox, console: Path, patience: float) -> str | None:
    """None when the guest showed up; else why not."""
    ended = asyncio.ensure_future(sandbox.exited())
    deadline = time.monotonic() + patience
    try:
        while True:
            over = ended.done()
            text = console.read_text(errors="replace")
            if ALIVE in text:
                return None
            if over:
                told = text.splitlines()[1:2] or ["it said nothing"]
                return f"QEMU ended with exit code {ended.result()}: {told[0][:200]}"
            if time.monotonic() > deadline:
                return f"nothing after {patience:g} s"
            await asyncio.wait({ended}, timeout=_LOOK)
    finally:
        ended.cancel()


async def _key(image: GuestImage) -> str:
    """What the answer depends on, as one digest."""
    process = await asyncio.create_subprocess_exec(
        PROGRAM, "-version", stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(_VERSION_TIMEOUT):
        version, _ = await process.communicate()
    parts = [
        hashlib.sha256(await asyncio.to_thread(image.kernel.read_bytes)).hexdigest(),
        hashlib.sha256(version).hexdigest(),
        platform.release(),
        _processor(),
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        str(os.getuid()),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("model name")), platform.machine())
