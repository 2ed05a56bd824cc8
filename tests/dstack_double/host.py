"""The double's VMs: what they are made of, what state they are in, and what a test has them do."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.dstack_double.behaviour import Behaviour
from tests.dstack_double.messages import Refused

PROGRESS = ("booting", "data disk ready", "setting up docker", "starting containers", "done")
_NAME = re.compile(r"[A-Za-z0-9\-_. @~!$^()]*")
_IMAGE = re.compile(r"(?!.*\.\.)[A-Za-z0-9_\-.]{1,64}")
_APP_ID = 40
_RING = 20
_ANY = ("", "0.0.0.0", "::")


@dataclass(frozen=True, slots=True)
class Boot:
    """What a VM does when it is started.

    Attributes:
        takes: Seconds until it says `done`; None: it stays at its first step.
        error: `boot_error`, from the start on.
        exits: Seconds after which its process ends; None: never.
        stderr: What its process says at its end.
    """

    takes: float | None = 0.0
    error: str = ""
    exits: float | None = None
    stderr: str = ""


@dataclass(slots=True)
class Machine:
    """A VM. `began` and `ended` are seconds of the host's clock."""

    id: str
    configuration: dict[str, Any]
    app_id: str
    boot: Boot
    created: float
    started: bool = False
    began: float | None = None
    ended: float | None = None
    removing_since: float | None = None
    killed_at: float | None = None
    adopted: bool = False
    boots: int = 0
    stderr: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self.began is not None and self.ended is None

    @property
    def status(self) -> str:
        if self.removing_since is not None:
            return "removing"
        if self.started:
            return "running" if self.running else "exited"
        return "stopping" if self.running else "stopped"


class Host:
    """All of them. Nothing happens by itself: each call first brings every VM up to the clock.

    Attributes:
        boots: What a VM does when it is started, by its configuration; it is asked at each start.
        removal: Seconds that a removal takes in the background; None: for ever.
        restart_after: Seconds between the end of a process and its restart.
        stopping: Seconds that StopVm takes; None: for ever.
        gpus: Slots, when GPUs are enabled; None: they are not.
        base_domain: Of the gateway, perhaps with a port; None: there is none.
        hidden: Ids that Status and GetInfo never show.
        starts: How often a VM was started.
    """

    def __init__(self, behaviour: Behaviour, clock: Callable[[], float], images: tuple[str, ...]) -> None:
        self.behaviour = behaviour
        self.images = images
        self.boots: Callable[[dict[str, Any]], Boot] = lambda _configuration: Boot()
        self.removal: float | None = 0.0
        self.restart_after = 20.0
        self.stopping: float | None = 0.0
        self.gpus: tuple[str, ...] | None = None
        self.attach_all = False
        self.port_mapping = True
        self.base_domain: str | None = None
        self.port_range = (1, 20000)
        self.hidden: set[str] = set()
        self.starts = 0
        self.machines: dict[str, Machine] = {}
        self.clock = clock

    # What happens

    def advance(self) -> None:
        """Let everything happen that is due."""
        now = self.clock()
        for machine in list(self.machines.values()):
            if machine.removing_since is not None:
                if self.removal is not None and now >= machine.removing_since + self.removal:
                    del self.machines[machine.id]
                continue
            exits = machine.boot.exits
            if machine.running and machine.killed_at is not None and now >= machine.killed_at:
                machine.ended = machine.killed_at
            if machine.running and exits is not None and now >= (machine.began or 0.0) + exits:
                machine.ended, machine.stderr = (machine.began or 0.0) + exits, machine.boot.stderr
            if machine.started and machine.ended is not None and now >= machine.ended + self.restart_after:
                self._start(machine)

    def create(self, configuration: dict[str, Any]) -> Machine:
        """CreateVm."""
        compose = self._read_compose(configuration["compose_file"])
        if not _NAME.fullmatch(configuration["name"]):
            raise Refused("Failed to create VM", "Invalid name")
        if configuration["image"] not in self.images or not _IMAGE.fullmatch(configuration["image"]):
            raise Refused("Failed to load image", f"image {configuration['image']!r} not found")
        self._check_ports(configuration["ports"])
        configuration["gpus"] = self._checked_gpus(configuration["gpus"])
        app_id = configuration["app_id"] or compose[:_APP_ID]
        if len(app_id) != _APP_ID:
            raise Refused("Failed to create VM", "Invalid app ID")
        machine = Machine(str(uuid.uuid4()), configuration, app_id, Boot(), self.clock())
        self.machines[machine.id] = machine
        if not configuration.get("stopped", False):
            self._start(machine)
        return machine

    def start(self, vm_id: str) -> None:
        """StartVm: no second start of what runs."""
        machine = self.found(vm_id, "Failed to start VM")
        if machine.removing_since is not None:
            raise Refused("Failed to start VM", "VM is being removed")
        if not machine.running:
            self._start(machine)
        machine.started = True

    def stop(self, vm_id: str) -> None:
        """StopVm: it is not restarted any more, and its process is killed."""
        machine = self.found(vm_id, "Failed to stop VM")
        machine.started = False
        if machine.running and self.stopping is not None:
            machine.killed_at = self.clock() + self.stopping

    def shutdown(self, vm_id: str) -> None:
        """ShutdownVm: by the guest, which must have booted."""
        machine = self.found(vm_id, "Failed to shutdown VM")
        if not machine.running or self.progress(machine) != "done":
            raise Refused("Failed to shutdown VM", "guest agent is not reachable")
        self.stop(vm_id)

    def remove(self, vm_id: str) -> None:
        """RemoveVm."""
        if self.behaviour.removes_at_once:
            machine = self.machines.get(vm_id)
            if machine is None:
                raise Refused("Failed to remove VM directory", "No such file or directory (os error 2)")
            if machine.running:
                raise Refused("Failed to remove VM", "VM is running, stop it first")
            del self.machines[vm_id]
            return
        machine = self.found(vm_id, "Failed to remove VM")
        if machine.removing_since is None:
            machine.started = False
            machine.removing_since = self.clock()

    def update(self, asked: dict[str, Any]) -> str:
        """UpdateVm: the new app id, or nothing when the compose file stays."""
        machine = self.found(asked["id"], "Failed to update VM")
        sizes = {
            key: asked[key] for key in ("vcpu", "memory", "disk_size", "image") if asked[key] is not None
        }
        if sizes and machine.running:
            raise Refused("Failed to update VM", "vm should be stopped before resize")
        if sizes.get("disk_size", machine.configuration["disk_size"]) < machine.configuration["disk_size"]:
            raise Refused("Failed to update VM", "Cannot shrink disk size")
        machine.configuration |= sizes
        if asked["update_ports"]:
            machine.configuration["ports"] = asked["ports"]
        if asked["user_config"]:
            machine.configuration["user_config"] = asked["user_config"]
        if not asked["compose_file"]:
            return ""
        machine.app_id = self._read_compose(asked["compose_file"])[:_APP_ID]
        machine.configuration["compose_file"] = asked["compose_file"]
        return machine.app_id

    def restarted(self) -> None:
        """The VMM itself was restarted: VMs run on, and what it knew of their boot is lost."""
        for machine in self.machines.values():
            machine.adopted = machine.running

    # What is seen

    def found(self, vm_id: str, context: str) -> Machine:
        """Or a refusal."""
        machine = self.machines.get(vm_id)
        if machine is None:
            raise Refused(context, f"VM not found: {vm_id}" if vm_id else "VM not found")
        return machine

    def visible(self) -> list[Machine]:
        """By the time of their creation."""
        shown = [machine for machine in self.machines.values() if machine.id not in self.hidden]
        return sorted(shown, key=lambda machine: machine.created)

    def progress(self, machine: Machine) -> str:
        """`boot_progress`."""
        if machine.began is None:
            return ""
        if machine.adopted:
            return "running"
        takes, since = machine.boot.takes, self.clock() - machine.began
        if takes is None or machine.boot.error:
            return PROGRESS[0]
        return PROGRESS[-1] if since >= takes else PROGRESS[int(since / takes * (len(PROGRESS) - 1))]

    def instance(self, machine: Machine) -> str | None:
        """Known once the guest has said it, late in its boot."""
        if self.progress(machine) not in ("done", "running"):
            return None
        return hashlib.sha256(f"{machine.id}{machine.boots}".encode()).hexdigest()[:40]

    def app_url(self, machine: Machine) -> str | None:
        """By the gateway, once the instance is known."""
        instance, compose = self.instance(machine), json.loads(machine.configuration["compose_file"])
        if self.base_domain is None or instance is None or not compose.get("gateway_enabled"):
            return None
        return f"https://{instance}-8090.{self.base_domain}"

    def compose_hash(self, compose: str) -> str:
        """GetComposeHash."""
        return self._read_compose(compose)

    def free(self, slot: str) -> bool:
        """Whether no running VM has the GPU."""
        attached = (
            one
            for machine in self.machines.values()
            if machine.running and machine.configuration["gpus"]
            for one in machine.configuration["gpus"]["gpus"]
        )
        return all(one["slot"] != slot for one in attached)

    def _start(self, machine: Machine) -> None:
        machine.boot = self._conflict(machine) or self.boots(machine.configuration)
        machine.started, machine.adopted = True, False
        machine.began, machine.ended, machine.killed_at, machine.stderr = self.clock(), None, None, ""
        machine.boots += 1
        self.starts += 1
        event = {"event": "boot.progress", "body": "booting", "timestamp": 1_730_000_000_000 + machine.boots}
        machine.events = [*machine.events, event][-_RING:]
        if machine.boot.exits == 0.0:
            machine.ended, machine.stderr = machine.began, machine.boot.stderr

    def _conflict(self, machine: Machine) -> Boot | None:
        """QEMU finds out at its start what nobody looked at before, and dies."""
        for other in self.machines.values():
            if other.id == machine.id or not other.running:
                continue
            for port in machine.configuration["ports"]:
                if any(_same(port, one) for one in other.configuration["ports"]):
                    rule = f"tcp:127.0.0.1:{port['host_port']}-:{port['vm_port']}"
                    return Boot(exits=0.0, stderr=f"Could not set up host forwarding rule '{rule}'")
            mine, theirs = machine.configuration["gpus"], other.configuration["gpus"]
            if mine and theirs and any(one in theirs["gpus"] for one in mine["gpus"]):
                return Boot(exits=0.0, stderr="vfio 0000:18:00.0: failed to open: Device or resource busy")
        return None

    def _check_ports(self, ports: list[dict[str, Any]]) -> None:
        if ports and not self.port_mapping:
            raise Refused("Failed to create VM", "Port mapping is disabled")
        for port in ports:
            if port["protocol"] not in ("tcp", "udp"):
                raise Refused("Failed to create VM", "Invalid protocol")
            if not self.port_range[0] <= port["host_port"] <= self.port_range[1]:
                raise Refused(
                    "Failed to create VM",
                    f"Port mapping is not allowed for {port['protocol']}:{port['host_port']}",
                )
            port["host_address"] = port["host_address"] or "127.0.0.1"
        if not self.behaviour.checks_ports:
            return
        taken = [one for machine in self.machines.values() for one in machine.configuration["ports"]]
        for at, port in enumerate(ports):
            if any(_same(port, one) for one in [*taken, *ports[:at]]):
                raise Refused("Failed to create VM", f"Port mapping conflict: {port['host_port']}")

    def _checked_gpus(self, gpus: dict[str, Any] | None) -> dict[str, Any] | None:
        if gpus is None:
            return None
        if gpus["attach_mode"] not in ("listed", "all"):
            raise Refused("Failed to create VM", f"Invalid GPU attach mode: {gpus['attach_mode']}")
        if self.gpus is None:
            how, empty = self.behaviour.disabled_gpus, gpus["attach_mode"] == "listed" and not gpus["gpus"]
            if how == "drop" or (how == "unless-empty" and empty):
                return None
            raise Refused("Failed to create VM", "GPU is not enabled")
        if gpus["attach_mode"] == "all" and not self.attach_all:
            raise Refused("Failed to create VM", "Attaching all GPUs is not allowed")
        return gpus

    def _read_compose(self, compose: str) -> str:
        """Its hash."""
        try:
            value = json.loads(compose)
            manifest = value["manifest_version"]
            named = isinstance(value["name"], str) and isinstance(value["runner"], str)
        except (ValueError, KeyError, TypeError) as error:
            raise Refused("Failed to read compose file", f"missing field or not JSON: {error}") from error
        number = isinstance(manifest, int) and manifest in (1, 2)
        if not named or not (number or (self.behaviour.string_manifest and isinstance(manifest, str))):
            raise Refused("Failed to read compose file", "invalid type")
        return hashlib.sha256(compose.encode()).hexdigest()


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if (one["protocol"], one["host_port"]) != (other["protocol"], other["host_port"]):
        return False
    first, second = one["host_address"], other["host_address"]
    return first == second or first in _ANY or second in _ANY
