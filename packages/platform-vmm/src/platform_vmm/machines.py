"""All VMs of one VMM: made, found, and brought back after a crash."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import time
import uuid
from pathlib import Path

import structlog

from platform_vmm.app_compose import read_app_compose
from platform_vmm.configuration import VmConfiguration
from platform_vmm.errors import StateInUse, VmmError, VmNotFound
from platform_vmm.images import IMAGE, RuntimeTable
from platform_vmm.machine import Host, Machine
from platform_vmm.sandbox.cgroups import ControlGroups
from platform_vmm.sandbox.driver import SandboxDriver
from platform_vmm.simulation.pki import Pki

log = structlog.get_logger(__name__)
FIRST_UID = 300_000
MOST_VMS = 1000


class Machines:
    """The registry. Enter it as a context: it locks the state directory and ends every guest when left.

    VMs whose record says started are started again, as dstack does; half-removed ones are removed.
    """

    def __init__(
        self, state: Path, *, runtimes: RuntimeTable, pki: Pki, guest_ports: tuple[int, ...]
    ) -> None:
        self._state = state
        self._folder = state / "vms"
        self._groups = ControlGroups(f"platform-vmm-{_name_of(state)}")
        self._uids: set[int] = set()
        self.driver = SandboxDriver(self._groups)
        self._host = Host(
            driver=self.driver,
            runtimes=runtimes,
            pki=pki,
            guest_ports=guest_ports,
            claim_uid=self._claim_uid,
            free_uid=self._uids.discard,
        )
        self._machines: dict[str, Machine] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._lives: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._lock: int | None = None

    @property
    def limits_hold(self) -> bool:
        """Whether control groups limit guests on this host."""
        return self._groups.limits_hold

    async def run(self, ready: asyncio.Event) -> None:
        """Reclaim what a crash left, start what was started, serve until `stop`, then end every guest."""
        self._take_lock()
        try:
            await self._reclaim()
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._lives = [tasks.create_task(self._live(machine)) for machine in self._restore()]
                ready.set()
                await self._stopping.wait()
                for task in self._lives:
                    task.cancel()
        finally:
            self._tasks = None
            self._groups.close()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def stop(self) -> None:
        """End `run`."""
        self._stopping.set()

    def create(self, configuration: VmConfiguration) -> Machine:
        """Make a VM and, unless `stopped`, start it.

        Raises:
            VmmError: The image is unknown, the compose file unreadable, a host port taken, or too many VMs.
        """
        if self._tasks is None:
            raise VmmError("the VMM is stopping")
        if configuration.image != IMAGE:
            raise VmmError(
                f"Failed to load image: {configuration.image!r} is not here; the local VMM has {IMAGE}"
            )
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
        identity = str(uuid.uuid4())
        folder = self._folder / identity
        folder.mkdir(mode=0o755)
        machine = Machine(
            id=identity,
            configuration=configuration,
            folder=folder,
            host=self._host,
            created_at=time.time(),
            started=not configuration.stopped,
            alive=not configuration.stopped,
        )
        machine.save()
        self._machines[identity] = machine
        self._lives = [task for task in self._lives if not task.done()]
        self._lives.append(self._tasks.create_task(self._live(machine)))
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
        return sorted(self._machines.values(), key=lambda machine: machine.created_at)

    async def _live(self, machine: Machine) -> None:
        try:
            await machine.run()
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("vm_loop_died", vm=machine.id)
            machine.started = False
            machine.boot_error = "internal error: see the VMM's log"
            return
        self._machines.pop(machine.id, None)
        log.info("vm_removed", vm=machine.id, name=machine.configuration.name)

    def _restore(self) -> list[Machine]:
        for folder in sorted(self._folder.iterdir()):
            try:
                record = json.loads((folder / "vm.json").read_text())
                machine = Machine(
                    id=record["id"],
                    configuration=VmConfiguration.model_validate(record["configuration"]),
                    folder=folder,
                    host=self._host,
                    created_at=record["created_at"],
                    started=record["started"],
                    removing=record["removing"],
                )
            except (OSError, ValueError, KeyError) as error:
                log.warning("vm_record_unreadable", folder=folder.name, reason=str(error))
                shutil.rmtree(folder, ignore_errors=True)
                continue
            self._machines[machine.id] = machine
        return self.all()

    async def _reclaim(self) -> None:
        self._folder.mkdir(mode=0o711, exist_ok=True)
        for name in self._groups.leftovers():
            log.warning("sandbox_reclaimed", vm=name)
            await self._groups.remove(name)

    def _take_lock(self) -> None:
        self._lock = os.open(self._state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateInUse(
                f"another platform-vmm uses {self._state}: stop it, or give --state-dir"
            ) from error

    def _claim_uid(self) -> int:
        uid = next(
            uid for uid in range(FIRST_UID + _slot_base(self._state), FIRST_UID * 2) if uid not in self._uids
        )
        self._uids.add(uid)
        return uid


def _name_of(state: Path) -> str:
    path = state / "id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _slot_base(state: Path) -> int:
    """Apart for each state directory, so that two VMMs of one host share no uid."""
    return int(_name_of(state), 16) % 90 * MOST_VMS
