"""One boot of one VM: what the guest is given, its agent, its host ports, its driver."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from platform_vmm.agent import AgentFacts, GuestAgent
from platform_vmm.app_compose import AppCompose, Service, check_supported, read_service
from platform_vmm.configuration import VmConfiguration
from platform_vmm.driver import Guest
from platform_vmm.errors import VmmError
from platform_vmm.filesystem import read_filesystem_policy
from platform_vmm.image_table import ImageTable
from platform_vmm.images import Runtime
from platform_vmm.restarts import RestartPolicy
from platform_vmm.sandbox.recipe import MIB, Recipe
from platform_vmm.simulation.measured import boot_event_log, measurements
from platform_vmm.simulation.pki import Pki
from platform_vmm.simulation.quote import make_quote

_PIDS = 512
_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class Host:
    """What every machine shares. `claim_uid` gives a free uid, `free_uid` takes it back."""

    images: ImageTable
    pki: Pki
    guest_ports: tuple[int, ...]
    claim_uid: Callable[[], int]
    free_uid: Callable[[int], None]
    restarts: RestartPolicy = field(default_factory=RestartPolicy)


class Boot:
    """From nothing to a running guest, and back. `progress` is told dstack's words for the stages."""

    def __init__(
        self,
        identity: str,
        *,
        configuration: VmConfiguration,
        app: AppCompose,
        app_id: str,
        folder: Path,
        host: Host,
        progress: Callable[[str], None],
    ) -> None:
        self._id = identity
        self._configuration = configuration
        self._app = app
        self._app_id = app_id
        self._folder = folder
        self._host = host
        self._progress = progress
        self._uid = host.claim_uid()
        self._agent: GuestAgent | None = None
        self._forwards: list[tuple[socket.socket, int]] = []
        self.instance_id = ""
        self.guest: Guest | None = None

    async def start(self) -> Guest:
        """Start the guest.

        Raises:
            VmmError: It cannot be; the text is the boot error.
            OSError: The host refused something.
        """
        self._progress("booting")
        check_supported(self._app)
        service = await asyncio.to_thread(read_service, self._app.docker_compose)
        image = self._host.images.find(self._configuration.image)
        runtime = image.runtimes.find(service.image, service.digest)
        self._progress("initializing data disk")
        await self._start_agent(runtime)
        self._progress("setting up docker")
        self._forwards = [(_listen(port.host_port), port.vm_port) for port in self._configuration.ports]
        self._progress("starting containers")
        forwards, self._forwards = self._forwards, []
        self.guest = await image.driver.start(
            self._id,
            self._recipe(runtime, service),
            uid=self._uid,
            log=self._folder / "serial.log",
            forwards=forwards,
        )
        return self.guest

    async def end(self) -> None:
        """Kill the guest and free everything. Safe to call again, also after a failure.

        Raises:
            TimeoutError: Something of the guest does not die; it is still there.
            OSError: As above.
        """
        for listener, _ in self._forwards:
            listener.close()
        self._forwards = []
        if self._agent is not None:
            await self._agent.close()
            self._agent = None
        if self.guest is not None:
            await self.guest.destroy()
            self.guest = None
        self._host.free_uid(self._uid)

    async def _start_agent(self, runtime: Runtime) -> None:
        shared = self._folder / "shared"
        shared.mkdir(mode=0o755, exist_ok=True)
        config = shared / ".user-config"
        config.unlink(missing_ok=True)
        config.touch(0o600)
        config.write_text(self._configuration.user_config)
        config.chmod(0o400)
        if os.getuid() == 0:
            os.chown(config, self._uid, self._uid)
        (shared / "app-compose.json").write_text(self._configuration.compose_file)
        seed = secrets.token_bytes(20)
        self.instance_id = hashlib.sha256(seed + bytes.fromhex(self._app_id)).hexdigest()[:40]
        events = boot_event_log(
            self._app, app_id=self._app_id, instance_id=self.instance_id, runtime_digest_text=runtime.digest
        )
        measured = measurements(events, self._app)
        pki = self._host.pki
        quotes = self._configuration.simulated_tee == "dstack-tdx"
        self._agent = GuestAgent(
            AgentFacts(
                app_id=self._app_id,
                app_name=self._app.name,
                instance_id=self.instance_id,
                compose_hash=self._app.hash,
                event_log=events,
                vm_config=json.dumps({"simulated": True, "vmm": "platform-vmm"}),
                measured=measured,
                quote=(lambda data: make_quote(pki, measured, data)) if quotes else None,
            )
        )
        await self._agent.start(shared / "dstack.sock")

    def _recipe(self, runtime: Runtime, service: Service) -> Recipe:
        configuration = self._configuration
        memory = configuration.memory * MIB
        return Recipe(
            command=runtime.boot if service.command == ("platform-boot",) else service.command,
            environment={
                "PATH": _PATH,
                "HOME": "/root",
                "LANG": "C.UTF-8",
                "PYTHONPATH": runtime.library,
                "PYTHONUNBUFFERED": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
                **service.environment,
            },
            image=runtime.path,
            shared=self._folder / "shared",
            memory_bytes=min(memory, service.memory_limit or memory),
            disk_bytes=configuration.disk_size * 1024 * MIB,
            cpus=configuration.vcpu,
            pids=_PIDS,
            ports=self._host.guest_ports,
            scratch=service.scratch,
            filesystem=read_filesystem_policy(configuration.user_config),
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
