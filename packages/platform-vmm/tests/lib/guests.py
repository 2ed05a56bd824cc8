"""VMs of a real VMM for tests: a guest runs a script of the test's own and prints what it found as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from platform_vmm.configuration import read_configuration
from platform_vmm.images import IMAGE, Runtime
from platform_vmm.machine import Machine
from platform_vmm.machines import Machines
from platform_vmm.sandbox.console import boots
from platform_vmm.state import StateDirectory


@dataclass
class Guests:
    """A VMM in this process, with what a test asks of it."""

    machines: Machines
    runtime: Runtime
    state: StateDirectory
    guest_port: int
    image: str = IMAGE
    made: list[Machine] = field(default_factory=list)

    def message(self, command: list[str] | str, **more: Any) -> dict[str, Any]:
        """CreateVm's, for a guest that runs a command, or a Python script given as text."""
        words = [self.runtime.boot[0], "-I", "-c", command] if isinstance(command, str) else command
        service: dict[str, Any] = {
            "image": f"{self.runtime.name}@{self.runtime.digest}",
            "command": [word.replace("$", "$$") for word in words],
            **more.pop("service", {}),
        }
        compose = {
            "manifest_version": 2,
            "name": "test",
            "runner": "docker-compose",
            "key_provider": "none",
            "docker_compose_file": json.dumps({"services": {"one": service}}),
            **more.pop("app", {}),
        }
        size = {"vcpu": 1, "memory": 256, "disk_size": 1}
        return (
            {"image": self.image, "compose_file": json.dumps(compose), "no_tee": True, "name": "t"}
            | size
            | more
        )

    def create(self, command: list[str] | str, **more: Any) -> Machine:
        """A VM that runs a command or a script."""
        machine = self.machines.create(read_configuration(self.message(command, **more)))
        self.made.append(machine)
        return machine

    async def run(self, script: list[str] | str, **more: Any) -> Any:
        """Run a script, or a command, to its end in a VM of its own, and remove the VM.

        What it printed last, as JSON.
        """
        machine = self.create(script, **more)
        await until(lambda: machine.state == "exited", machine)
        output = serial(machine)
        await self.remove(machine)
        lines = [line for line in output.splitlines() if line.startswith(("{", "["))]
        assert lines, output
        return json.loads(lines[-1])

    async def remove(self, machine: Machine) -> None:
        """Remove a VM and wait until it is gone."""
        machine.remove()
        await until(lambda: machine not in self.machines.all(), machine)


def serial(machine: Machine) -> str:
    """All that the guest wrote, over all boots kept."""
    return "".join(path.read_text(errors="replace") for path in boots(machine.console))


async def until(condition: Callable[[], object], about: object = "", timeout: float = 20.0) -> None:
    """Wait for a condition of ours or of the kernel's, which tells nobody when it comes true."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while not condition():
        if loop.time() > deadline:
            told = f"{list(about.events)} {serial(about)[-2000:]}" if isinstance(about, Machine) else ""
            raise AssertionError(f"not true after {timeout} s: {about!r} {told}")
        await asyncio.sleep(0.005)
