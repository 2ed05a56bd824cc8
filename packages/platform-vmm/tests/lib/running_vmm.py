"""Sandboxes and VMs for tests: the real driver, the real runtime image, commands of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platform_vmm.images import Runtime
from platform_vmm.machine import Machine
from platform_vmm.machines import Machines
from platform_vmm.prpc import Prpc
from platform_vmm.sandbox.cgroups import ControlGroups
from platform_vmm.sandbox.driver import Sandbox, SandboxDriver
from platform_vmm.sandbox.recipe import MIB, Recipe

UID = 2_400_000 + os.getpid() % 100_000 * 2
"""Apart from every VMM of this host, and from another test process."""


def compose(runtime: Runtime, command: Sequence[str], **service: Any) -> str:
    """app-compose.json whose one service runs `command`."""
    inner = {"image": f"{runtime.name}@{runtime.digest}", "command": list(command), **service}
    document = {
        "manifest_version": 2,
        "name": "test",
        "runner": "docker-compose",
        "docker_compose_file": json.dumps({"services": {"challenge": inner}}),
    }
    return json.dumps(document)


@dataclass
class Bench:
    """Runs one command in one sandbox and tells how it ended."""

    folder: Path
    runtime: Runtime
    groups: ControlGroups

    async def run(self, script: str, *, timeout: float = 30, **change: Any) -> tuple[int | None, str]:
        """(exit code, console) of a Python script inside."""
        async with self.running(script, **change) as sandbox, asyncio.timeout(timeout):
            code = await sandbox.exited()
        return code, self.log.read_text(errors="replace").partition("\n")[2]

    @property
    def log(self) -> Path:
        """The console."""
        return self.folder / "serial.log"

    @contextlib.asynccontextmanager
    async def running(self, script: str, **change: Any) -> AsyncIterator[Sandbox]:
        """A Python script inside, which ends with this at the latest."""
        shared = self.folder / "shared"
        shared.mkdir(exist_ok=True)
        (shared / ".user-config").write_text("{}")
        (shared / "dstack.sock").touch()
        self.log.unlink(missing_ok=True)
        given: dict[str, Any] = {
            "command": [self.runtime.boot[0], "-c", script],
            "environment": {"PATH": "/usr/bin:/bin", "HOME": "/root"},
            "image": self.runtime.path,
            "shared": shared,
            "memory_bytes": 192 * MIB,
            "disk_bytes": 64 * MIB,
            "cpus": 1,
            "pids": 64,
            "ports": [],
        } | change
        driver = SandboxDriver(self.groups)
        uid = UID if os.getuid() == 0 else os.getuid()
        sandbox = await driver.start("test", Recipe(**given), uid=uid, log=self.log, forwards=[])
        try:
            yield sandbox
        finally:
            await sandbox.destroy()


@dataclass
class Vmm:
    """A VMM in this process, called like its API."""

    machines: Machines
    prpc: Prpc
    runtime: Runtime

    def create(self, command: Sequence[str] = ("sleep", "60"), **more: Any) -> Machine:
        """CreateVm."""
        message = {
            "name": "pv-test",
            "image": "local-sandbox",
            "compose_file": compose(self.runtime, command),
            "vcpu": 1,
            "memory": 192,
            "disk_size": 1,
            "no_tee": True,
        } | more
        identity: str = self.prpc.call("CreateVm", message)["id"]
        return self.machines.get(identity)

    def info(self, identity: str) -> dict[str, Any]:
        """GetInfo."""
        found: dict[str, Any] = self.prpc.call("GetInfo", {"id": identity})
        return found

    async def until(self, identity: str, **wanted: Any) -> dict[str, Any]:
        """Wait until GetInfo shows these; an absent VM has found False."""
        async with asyncio.timeout(40):
            while True:
                found = self.info(identity)
                shown = (found["info"] or {}) | {"found": found["found"]}
                if all(shown.get(key) == value for key, value in wanted.items()):
                    return shown
                await asyncio.sleep(0.02)
