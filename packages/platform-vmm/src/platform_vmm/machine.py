"""One VM of the local VMM: its record on disk, its sandbox, and dstack's states and restarts around it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from platform_vmm.agent import AgentFacts, GuestAgent
from platform_vmm.app_compose import AppCompose, read_app_compose, read_service
from platform_vmm.configuration import VmConfiguration
from platform_vmm.errors import SandboxFailed, VmmError
from platform_vmm.images import Runtime, RuntimeTable
from platform_vmm.sandbox.driver import Sandbox, SandboxDriver
from platform_vmm.sandbox.recipe import MIB, Recipe
from platform_vmm.simulation.measured import boot_event_log, measurements
from platform_vmm.simulation.pki import Pki
from platform_vmm.simulation.quote import make_quote

log = structlog.get_logger(__name__)
RESTART_FIRST, RESTART_MOST, RESTARTS = 5.0, 300.0, 5
_PIDS = 512
_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class Host:
    """What every machine shares. `claim_uid` gives a free uid, `free_uid` takes it back."""

    driver: SandboxDriver
    runtimes: RuntimeTable
    pki: Pki
    guest_ports: tuple[int, ...]
    claim_uid: Callable[[], int]
    free_uid: Callable[[int], None]


@dataclass(slots=True)
class Machine:
    """`started` is what was asked for; the process is what is. Both together are dstack's state."""

    id: str
    configuration: VmConfiguration
    folder: Path
    host: Host
    created_at: float
    started: bool
    removing: bool = False
    boot_progress: str = ""
    boot_error: str = ""
    shutdown_progress: str = ""
    instance_id: str | None = None
    alive: bool = False
    """Whether its process is there, or being made."""
    began: float | None = None
    ended: float | None = None
    sandbox: Sandbox | None = None
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=20))
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def app(self) -> AppCompose:
        """The app-compose that was given."""
        return read_app_compose(self.configuration.compose_file)

    @property
    def app_id(self) -> str:
        """Given, or the first 20 bytes of the compose hash."""
        return (self.configuration.app_id or "").lower().removeprefix("0x") or self.app.app_id

    @property
    def state(self) -> str:
        """running, stopping, stopped, exited or removing."""
        if self.removing:
            return "removing"
        if self.alive:
            return "running" if self.started else "stopping"
        return "exited" if self.started else "stopped"

    @property
    def console(self) -> Path:
        """The serial log."""
        return self.folder / "serial.log"

    def save(self) -> None:
        """Write the record, durably, before anything is done by it."""
        record = {
            "id": self.id,
            "created_at": self.created_at,
            "started": self.started,
            "removing": self.removing,
            "configuration": self.configuration.model_dump(),
        }
        scratch = self.folder / ".vm.json"
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(self.folder / "vm.json")

    def want(self, *, started: bool) -> None:
        """Ask for another state; the machine's loop brings it about."""
        if self.removing:
            raise VmmError("VM is being removed")
        self.started = started
        self.save()
        self.changed.set()

    def remove(self) -> None:
        """Ask for its end: stopped, then deleted, in the background."""
        self.removing = True
        self.started = False
        self.save()
        self.changed.set()

    async def run(self) -> None:
        """The machine's life, until it is removed; then nothing of it is left."""
        failures = 0
        while not self.removing:
            self.changed.clear()
            if not self.started:
                failures = 0
                await self.changed.wait()
                continue
            self.note("vmm.start", "")
            began = time.monotonic()
            await self._boot_and_wait()
            if not self.started:
                continue
            failures = failures + 1 if time.monotonic() - began < RESTART_MOST else 1
            if failures > RESTARTS:
                self.note("vmm.auto_restart.exhausted", f"{RESTARTS} restarts did not help")
                await self.changed.wait()
                failures = 0
                continue
            pause = min(RESTART_FIRST * 2 ** (failures - 1), RESTART_MOST)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self.changed.wait()
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    def note(self, event: str, body: str) -> None:
        """An event in the ring that GetInfo shows."""
        self.events.append({"event": event, "body": body[:4096], "timestamp": int(time.time() * 1000)})

    def progress(self, text: str) -> None:
        """What the boot is doing."""
        self.boot_progress = text
        self.note("boot.progress", text)

    async def _boot_and_wait(self) -> None:
        self.alive = True
        uid = self.host.claim_uid()
        agent: GuestAgent | None = None
        forwards: list[tuple[socket.socket, int]] = []
        self.boot_error, self.shutdown_progress = "", ""
        self.began, self.ended = time.monotonic(), None
        try:
            self.progress("booting")
            service = read_service(self.app.docker_compose)
            runtime = self.host.runtimes.find(service.image, service.digest)
            command = runtime.boot if service.command == ("platform-boot",) else service.command
            agent = await self._start_agent(runtime, uid)
            forwards = [(_listen(port.host_port), port.vm_port) for port in self.configuration.ports]
            self.progress("starting containers")
            recipe = self._recipe(runtime, command, service.environment)
            self.sandbox = await self.host.driver.start(
                self.id, recipe, uid=uid, log=self.console, forwards=forwards
            )
            forwards = []
            self.progress("done")
            log.info("vm_started", vm=self.id, name=self.configuration.name, pid=self.sandbox.pid)
            await self._wait_for_end(self.sandbox)
        except (VmmError, SandboxFailed, OSError) as error:
            self.boot_error = str(error)
            self.note("boot.error", str(error))
            log.warning("vm_boot_failed", vm=self.id, reason=str(error))
        finally:
            for listener, _ in forwards:
                listener.close()
            if self.sandbox is not None:
                await self.host.driver.destroy(self.sandbox)
                self.sandbox = None
            if agent is not None:
                await agent.close()
            self.host.free_uid(uid)
            self.ended, self.alive = time.monotonic(), False
            log.info("vm_ended", vm=self.id, name=self.configuration.name, state=self.state)

    async def _wait_for_end(self, sandbox: Sandbox) -> None:
        lifetime = self._hard_lifetime()
        ended = asyncio.ensure_future(sandbox.exited())
        asked = asyncio.ensure_future(self._asked_to_stop())
        try:
            done, _ = await asyncio.wait(
                {ended, asked}, timeout=lifetime, return_when=asyncio.FIRST_COMPLETED
            )
            if ended in done:
                self.note("vm.exited", f"exit code {ended.result()}")
            elif not done:
                self.note("vm.lifetime", f"hard_lifetime_s {lifetime} reached")
                self.started = False
                self.save()
        finally:
            ended.cancel()
            asked.cancel()

    async def _asked_to_stop(self) -> None:
        while self.started:
            self.changed.clear()
            await self.changed.wait()

    def _hard_lifetime(self) -> float | None:
        try:
            value = json.loads(self.configuration.user_config).get("hard_lifetime_s")
        except (ValueError, AttributeError, RecursionError):
            return None
        return float(value) if isinstance(value, int | float) and value > 0 else None

    async def _start_agent(self, runtime: Runtime, uid: int) -> GuestAgent:
        shared = self.folder / "shared"
        shared.mkdir(mode=0o755, exist_ok=True)
        config = shared / ".user-config"
        config.write_text(self.configuration.user_config)
        config.chmod(0o400)
        if os.getuid() == 0:
            os.chown(config, uid, uid)
        (shared / "app-compose.json").write_text(self.configuration.compose_file)
        app = self.app
        self.instance_id = hashlib.sha256(secrets.token_bytes(20) + bytes.fromhex(self.app_id)).hexdigest()[
            :40
        ]
        events = boot_event_log(
            app, app_id=self.app_id, instance_id=self.instance_id, runtime_digest_text=runtime.digest
        )
        measured = measurements(events, app)
        pki = self.host.pki
        quotes = self.configuration.simulated_tee == "dstack-tdx"
        agent = GuestAgent(
            AgentFacts(
                app_id=self.app_id,
                app_name=app.name,
                instance_id=self.instance_id,
                compose_hash=app.hash,
                event_log=events,
                vm_config=json.dumps({"simulated": True, "vmm": "platform-vmm"}),
                quote=(lambda data: make_quote(pki, measured, data)) if quotes else None,
            )
        )
        await agent.start(shared / "dstack.sock")
        return agent

    def _recipe(self, runtime: Runtime, command: tuple[str, ...], environment: dict[str, str]) -> Recipe:
        library = f"/opt/platform/lib/{Path(runtime.boot[0]).name}/site-packages" if runtime.boot else ""
        return Recipe(
            command=command,
            environment={
                "PATH": _PATH,
                "HOME": "/root",
                "LANG": "C.UTF-8",
                "PYTHONPATH": library,
                "PYTHONUNBUFFERED": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
                **environment,
            },
            image=runtime.path,
            shared=self.folder / "shared",
            memory_bytes=self.configuration.memory * MIB,
            disk_bytes=self.configuration.disk_size * 1024 * MIB,
            cpus=self.configuration.vcpu,
            pids=_PIDS,
            ports=self.host.guest_ports,
        )


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise VmmError(
            f"Could not set up host forwarding rule 'tcp:127.0.0.1:{port}': {error.strerror}"
        ) from error
    return listener
