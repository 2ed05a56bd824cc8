"""Starts and ends one virtual machine: QEMU as the command of a sandbox, and the service's sandbox inside."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from platform_vmm.driver import Usage
from platform_vmm.errors import SandboxFailed, VmmError
from platform_vmm.qemu.accelerator import KVM, Accelerator, find_accelerator
from platform_vmm.qemu.argv import PROGRAM, VirtualMachine
from platform_vmm.qemu.guest.exchange import AGENT, BROKER, SERVICE, THROUGH
from platform_vmm.qemu.link import Link
from platform_vmm.rootfs.image import GuestImage
from platform_vmm.sandbox.driver import STAGE, Sandbox, SandboxDriver, stage_config
from platform_vmm.sandbox.recipe import IMAGE, Recipe
from platform_vmm.sandbox.relay import Relay, loopback
from platform_vmm.sandbox.syscalls import guest_filter

QEMU_IMAGE = "local-qemu"
_GUEST_UID = 300_000
_SHARED = Path("/run/shared")
_FILES = (".user-config", "app-compose.json")
_BOOT_TIMEOUT = 180.0
_DIAL_TIMEOUT = 20.0
_LAST_LINES = 24
_LINE = 120
_EMULATED = (
    "no KVM: the processor is emulated, which QEMU does not call a boundary; the sandbox around QEMU is one"
)


@dataclass(slots=True)
class VirtualGuest:
    """A running virtual machine. `sandbox` is the one that QEMU runs in."""

    sandbox: Sandbox
    link: Link

    @property
    def pid(self) -> int:
        """Bubblewrap's, around QEMU."""
        return self.sandbox.pid

    @property
    def walled(self) -> bool:
        """As the guest's init tells it."""
        return self.link.up.result()

    async def exited(self) -> int | None:
        """Wait for its end: the service's exit code, or None when the machine went first."""
        return await asyncio.shield(self.link.exited)

    def terminate(self) -> None:
        """SIGTERM to the service; whether it heeds it shows in `exited`."""
        self.link.terminate()

    def oom_kills(self) -> int:
        """How often the kernel of the host killed QEMU for memory."""
        return self.sandbox.oom_kills()

    def usage(self) -> Usage:
        """Processor and network as the host counts them, memory and disk as the guest tells them."""
        told = self.link.usage
        counted = self.sandbox.usage()
        return replace(
            counted,
            memory_bytes=told.get("memory_bytes", 0),
            memory_peak_bytes=told.get("memory_peak_bytes"),
            disk_total_bytes=told.get("disk_total_bytes", 0),
            disk_free_bytes=told.get("disk_free_bytes", 0),
        )

    async def destroy(self) -> None:
        """Kill it and free everything. Safe to call again.

        Raises:
            TimeoutError: Something of it does not die.
        """
        await self.link.close()
        await self.sandbox.destroy()


class QemuDriver:
    """Makes virtual machines of one image, each inside a sandbox of `sandboxes`."""

    def __init__(self, sandboxes: SandboxDriver, image: GuestImage, accelerator: Accelerator) -> None:
        self._sandboxes = sandboxes
        self._image = image
        self._accelerator = accelerator

    @property
    def level(self) -> str:
        """A kernel of its own."""
        return "Vm"

    @property
    def note(self) -> str:
        """For people."""
        found = self._accelerator
        return f"a virtual machine of QEMU's in a sandbox; not a TEE; {found.name}: {found.why}"

    @property
    def missing(self) -> str | None:
        """As of the sandboxes; whether QEMU is there was looked at before."""
        return self._sandboxes.missing

    @property
    def weaker(self) -> list[str]:
        """Guarantees that this machine, or running without root, does not give."""
        return self._sandboxes.weaker + ([] if self._accelerator.kvm else [_EMULATED])

    async def start(
        self, name: str, recipe: Recipe, *, uid: int, log: Path, forwards: list[tuple[socket.socket, int]]
    ) -> VirtualGuest:
        """Start a virtual machine and, in it, the service; returns when that was started.

        Raises:
            SandboxFailed: It could not be made, or did not come up; nothing of it is left.
        """
        waiting = [listener for listener, _ in forwards]
        folder = log.parent / "port"
        running: list[Sandbox] = []

        async def dial(header: str) -> socket.socket:
            return await _dial(running[0], link, header)

        targets = {str(port): Relay(loopback(port)) for port in recipe.ports}
        targets[AGENT] = Relay(partial(_agent, recipe.shared / "dstack.sock"))
        link = Link(name, dial=dial, targets=targets)
        try:
            link.config = self._config(recipe)
            folder.mkdir(mode=0o700, exist_ok=True)
            await link.listen(folder / "dstack.sock")
            sandbox = await self._sandboxes.start(
                name, self._outer(recipe, folder), uid=uid, log=log, forwards=[]
            )
            running.append(sandbox)
            sandbox.relays += targets.values()
            sandbox.outward += [targets[str(port)] for port in recipe.ports]
            for listener, port in forwards:
                waiting.remove(listener)
                await sandbox.relay(listener, partial(dial, f"I {port}\n"))
            await self._until_up(sandbox, link)
        except BaseException as error:
            for listener in waiting:
                listener.close()
            await link.close()
            for sandbox in running:
                await sandbox.destroy()
            if isinstance(error, SandboxFailed | OSError):
                raise SandboxFailed(_told(name, error, log)) from error
            raise
        return VirtualGuest(sandbox, link)

    async def _until_up(self, sandbox: Sandbox, link: Link) -> None:
        """Until the service was started; QEMU may end before that, and a guest may never say anything."""
        ended: asyncio.Future[Any] = asyncio.ensure_future(sandbox.exited())
        up: asyncio.Future[Any] = link.up
        try:
            await asyncio.wait({up, ended}, timeout=_BOOT_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if link.up.done():
            link.up.result()
        elif ended.done():
            raise SandboxFailed(f"QEMU ended with exit code {ended.result()}")
        else:
            raise SandboxFailed(f"it was not up after {_BOOT_TIMEOUT:g} s")

    def _outer(self, recipe: Recipe, folder: Path) -> Recipe:
        """The sandbox that QEMU runs in: the image, the port's socket, and nothing of the service's."""
        image = self._image
        machine = VirtualMachine(
            kernel=image.kernel.name,
            initrd=image.initrd.name,
            root=image.root.name,
            memory_bytes=recipe.memory_bytes,
            cpus=recipe.cpus,
            kvm=self._accelerator.kvm,
        )
        return machine.recipe(image.path, folder, devices=[str(KVM)] if self._accelerator.kvm else [])

    def _config(self, recipe: Recipe) -> dict[str, Any]:
        """What the guest is told first: the service's sandbox, as the host would make it."""
        inner = replace(
            recipe,
            image=Path(IMAGE),
            shared=_SHARED,
            disk_bytes=min(recipe.disk_bytes, recipe.memory_bytes // 2),
        )
        return {
            "program": STAGE.read_text(),
            "stage": stage_config(inner, uid=_GUEST_UID, system_filter=guest_filter(), root=True),
            "files": {name: (recipe.shared / name).read_text() for name in _FILES},
        }


async def make_driver(sandboxes: SandboxDriver, image: GuestImage, folder: Path, *, uid: int) -> QemuDriver:
    """A driver with the accelerator that works here; `folder` is where that is remembered.

    Raises:
        VmmError: QEMU is not installed.
        OSError: The answer could not be written, or QEMU not be run.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if shutil.which(PROGRAM) is None:
        raise VmmError(f"QEMU is not installed: install the package qemu-system-x86 ({PROGRAM} on PATH)")
    return QemuDriver(sandboxes, image, await find_accelerator(sandboxes, image, folder, uid=uid))


async def _dial(sandbox: Sandbox, link: Link, header: str) -> socket.socket:
    """A connection to the exchange inside the machine, which reads the header and says that it leads on."""
    if not link.up.done() or link.exited.done():
        raise SandboxFailed("the virtual machine is not up")
    fresh = await sandbox.control.connect((SERVICE, BROKER))
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT):
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(fresh, header.encode())
            if await loop.sock_recv(fresh, 1) != THROUGH:
                raise SandboxFailed("nothing in the virtual machine takes the connection")
    except BaseException:
        fresh.close()
        raise
    return fresh


async def _agent(path: Path) -> socket.socket:
    """A connection to the VMM's guest agent of this machine."""
    fresh = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fresh.setblocking(False)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT):
            await asyncio.get_running_loop().sock_connect(fresh, f"/proc/self/fd/{folder}/{path.name}")
    except BaseException:
        fresh.close()
        raise
    finally:
        os.close(folder)
    return fresh


def _told(name: str, error: BaseException, log: Path) -> str:
    """Why, with the last lines of the console: a guest that panics says it there."""
    reason = str(error) or type(error).__name__
    try:
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    except OSError:
        lines = []
    shown = "".join(f"\n  {_plain(line)}" for line in lines)
    return f"the virtual machine {name} did not come up: {reason}; the end of its console:{shown}"


def _plain(line: str) -> str:
    return "".join(char for char in line if char.isprintable())[:_LINE]
