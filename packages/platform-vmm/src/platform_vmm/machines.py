"""All VMs of one VMM: made, found, and brought back after a crash."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from pathlib import Path

import structlog

from platform_vmm.app_compose import read_app_compose
from platform_vmm.boot import Host
from platform_vmm.configuration import VmConfiguration
from platform_vmm.errors import RecordUnreadable, VmmError, VmNotFound
from platform_vmm.image_table import Image, ImageTable
from platform_vmm.images import IMAGE, RUNTIME, Runtime, RuntimeTable
from platform_vmm.machine import Machine
from platform_vmm.qemu.driver import QEMU_IMAGE, make_driver
from platform_vmm.record import Record
from platform_vmm.restarts import RestartPolicy
from platform_vmm.rootfs.image import GuestImage
from platform_vmm.sandbox.cgroups import ControlGroups
from platform_vmm.sandbox.driver import SandboxDriver
from platform_vmm.simulation.pki import Pki
from platform_vmm.state import StateDirectory

log = structlog.get_logger(__name__)
FIRST_UID = 300_000
MOST_VMS = 1000
_BLOCKS = 2000
_PAUSE = 5.0


class Machines:
    """The registry of a state directory whose lock the caller holds.

    After a crash of the VMM its guests are dead (their stages saw the control socket close); what is
    left of them is reclaimed at the next `run`. Then VMs whose record says started are started again,
    as dstack does, and half-removed ones are removed.
    """

    def __init__(
        self,
        state: StateDirectory,
        *,
        runtimes: RuntimeTable,
        pki: Pki,
        guest_image: GuestImage | None = None,
        guest_ports: tuple[int, ...] = (),
        restarts: RestartPolicy | None = None,
    ) -> None:
        self._folder = state.vms
        self._groups = ControlGroups(f"platform-vmm-{state.name}", ledger=state.groups)
        self._guest_uids = guest_uids(state.path)
        self._uids: set[int] = set()
        self._sandboxes = SandboxDriver(self._groups)
        self._images_folder = state.path / "images"
        self._guest_image = guest_image
        self.guest_ports = guest_ports
        self.images = ImageTable([Image(IMAGE, self._sandboxes, runtimes)])
        self._host = Host(
            images=self.images,
            pki=pki,
            guest_ports=guest_ports,
            claim_uid=self._claim_uid,
            free_uid=self._uids.discard,
            restarts=restarts or RestartPolicy(),
        )
        self._machines: dict[str, Machine] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._lives: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    async def run(self, ready: asyncio.Event) -> None:
        """Reclaim what a crash left, start what was started, serve until `stop`, then end every guest."""
        try:
            await self._reclaim()
            if self._guest_image is not None:
                await self._add_virtual_machines(self._guest_image)
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                for machine in self._restore():
                    self._begin(machine)
                ready.set()
                await self._stopping.wait()
                self._tasks = None
                for task in list(self._lives):
                    task.cancel()
        finally:
            self._tasks = None
            self._groups.close()

    def stop(self) -> None:
        """End `run`."""
        self._stopping.set()

    def create(self, configuration: VmConfiguration) -> Machine:
        """Make a VM and, unless `stopped`, start it.

        Raises:
            VmmError: The image is unknown, the compose file unreadable, a host port taken, or too many VMs.
        """
        self._admit(configuration)
        record = Record(
            id=str(uuid.uuid4()),
            configuration=configuration,
            created_at=time.time(),
            started=not configuration.stopped,
        )
        folder = self._folder / record.id
        folder.mkdir(mode=0o700)
        try:
            record.save(folder)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise VmmError(f"Failed to create VM directory: {error.strerror}") from error
        machine = Machine(record, folder, self._host)
        self._machines[machine.id] = machine
        self._begin(machine)
        return machine

    def get(self, identity: str) -> Machine:
        """One VM.

        Raises:
            VmNotFound: None of that id.
        """
        machine = self._machines.get(identity)
        if machine is None:
            raise VmNotFound(f"VM not found: {identity[:64]}")
        return machine

    def all(self) -> list[Machine]:
        """Every VM, oldest first."""
        return sorted(self._machines.values(), key=lambda machine: machine.record.created_at)

    def _admit(self, configuration: VmConfiguration) -> None:
        if self._tasks is None:
            raise VmmError("the VMM is stopping")
        self.images.find(configuration.image)
        read_app_compose(configuration.compose_file)
        if len(self._machines) >= MOST_VMS:
            raise VmmError(f"no CID available: {MOST_VMS} VMs exist")
        taken = {
            port.host_port: machine.id
            for machine in self._machines.values()
            for port in machine.configuration.ports
        }
        for port in configuration.ports:
            if port.host_port in taken:
                raise VmmError(f"port mapping tcp:{port.host_port} conflicts with VM {taken[port.host_port]}")
            taken[port.host_port] = "that is being made"

    def _begin(self, machine: Machine) -> None:
        if self._tasks is None:
            raise VmmError("the VMM is stopping")
        task = self._tasks.create_task(self._live(machine))
        self._lives.add(task)
        task.add_done_callback(self._lives.discard)

    async def _live(self, machine: Machine) -> None:
        while True:
            try:
                await machine.run()
                break
            except Exception:
                log.exception("vm_loop_broke", vm=machine.id)
                machine.boot_error = "internal error: see the VMM's log"
                await asyncio.sleep(_PAUSE)
        self._machines.pop(machine.id, None)
        log.info("vm_removed", vm=machine.id, name=machine.configuration.name)

    def _restore(self) -> list[Machine]:
        for folder in sorted(self._folder.iterdir()):
            try:
                machine = Machine(Record.load(folder), folder, self._host)
            except VmmError as error:
                level = log.info if isinstance(error, RecordUnreadable) else log.warning
                level("vm_record_dropped", folder=folder.name, reason=str(error))
                shutil.rmtree(folder, ignore_errors=True)
                continue
            self._machines[machine.id] = machine
        return self.all()

    async def _add_virtual_machines(self, image: GuestImage) -> None:
        """The image `local-qemu`, unless this machine lacks what it needs."""
        uid = self._claim_uid()
        try:
            driver = await make_driver(self._sandboxes, image, self._images_folder, uid=uid)
        except (VmmError, OSError) as error:
            log.warning("image_not_offered", image=QEMU_IMAGE, reason=str(error))
            return
        finally:
            self._uids.discard(uid)
        runtime = Runtime(RUNTIME, image.digest, image.path, image.boot, image.library)
        self.images.add(Image(QEMU_IMAGE, driver, RuntimeTable([runtime])))

    async def _reclaim(self) -> None:
        for name in await self._groups.reclaim():
            log.warning("sandbox_reclaimed", vm=name)

    def _claim_uid(self) -> int:
        if os.getuid() != 0:
            return os.getuid()
        uid = next(uid for uid in self._guest_uids if uid not in self._uids)
        self._uids.add(uid)
        return uid


def guest_uids(state: Path) -> range:
    """The uids that the guests of the VMM of this state directory have, as root: apart for each VMM."""
    first = FIRST_UID + int(StateDirectory(state).name, 16) % _BLOCKS * MOST_VMS
    return range(first, first + MOST_VMS)
