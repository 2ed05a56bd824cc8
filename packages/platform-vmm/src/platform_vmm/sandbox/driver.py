"""Starts and ends one sandbox: stage, control groups, relays, and the log of its console."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from platform_vmm.errors import SandboxFailed
from platform_vmm.sandbox.cgroups import ControlGroups, Limits
from platform_vmm.sandbox.console import Console
from platform_vmm.sandbox.control import Control, make_pair
from platform_vmm.sandbox.recipe import Recipe
from platform_vmm.sandbox.relay import Relay, loopback

_STAGE = Path(__file__).with_name("stage.py")
_GUEST = "10.0.2.15"
_START_TIMEOUT = 30.0
_INODES = 65_536


@dataclass(slots=True)
class Sandbox:
    """A running sandbox. `pid` is bubblewrap's, as the host sees it."""

    name: str
    pid: int
    filtered: bool
    control: Control
    console: Console
    stage: asyncio.subprocess.Process
    relays: list[Relay] = field(default_factory=list)

    async def exited(self) -> int | None:
        """Wait for its end: the guest's exit code, or None when the stage went first."""
        return await asyncio.shield(self.control.exited)


class SandboxDriver:
    """Makes sandboxes for one VMM. `groups` limits them; as root each gets a uid of its own."""

    def __init__(self, groups: ControlGroups) -> None:
        self._groups = groups
        self._bwrap = _program("bwrap")
        self._nft = _program("nft")

    @property
    def missing(self) -> str | None:
        """What the driver needs and this machine lacks, with what to do; None when all is there."""
        if self._bwrap is None:
            return "bubblewrap is not installed: install the package bubblewrap (bwrap on PATH)"
        return None

    async def start(
        self, name: str, recipe: Recipe, *, uid: int, log: Path, forwards: list[tuple[socket.socket, int]]
    ) -> Sandbox:
        """Start a sandbox. `forwards`: listening host sockets, each with the guest's port behind it.

        Raises:
            SandboxFailed: It could not be made; nothing of it is left.
        """
        console = Console(log)
        ours, theirs = make_pair()
        log_end = console.attach()
        try:
            stage = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(_STAGE),
                str(theirs),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs],
                env={"PATH": os.defpath},
                cwd="/",
            )
        except BaseException as error:
            ours.close()
            os.close(log_end)
            await console.close()
            if isinstance(error, OSError):
                raise SandboxFailed(f"the sandbox's stage could not be started: {error}") from error
            raise
        finally:
            os.close(theirs)
        control = Control(ours)
        sandbox = Sandbox(name, 0, filtered=False, control=control, console=console, stage=stage)
        try:
            control.send(json.dumps(self._config(recipe, uid)).encode(), [log_end])
            self._groups.create(name, Limits(recipe.memory_limit, recipe.cpus, recipe.pids))
            async with asyncio.timeout(_START_TIMEOUT):
                told, listeners = await asyncio.shield(control.started)
            sandbox.pid, sandbox.filtered = int(told["pid"]), bool(told["filtered"])
            await asyncio.to_thread(self._groups.attach, name, sandbox.pid)
            for listener, port in zip(listeners, recipe.ports, strict=True):
                await self._relay(sandbox, listener, loopback(port))
            for listener, port in forwards:
                await self._relay(sandbox, listener, lambda port=port: control.connect((_GUEST, port)))
            control.send(b"go")
        except (SandboxFailed, OSError, TimeoutError) as error:
            await self.destroy(sandbox)
            raise SandboxFailed(f"the sandbox {name} could not be started: {error}") from error
        except BaseException:
            await self.destroy(sandbox)
            raise
        finally:
            os.close(log_end)
        return sandbox

    async def destroy(self, sandbox: Sandbox) -> None:
        """Kill the whole tree and free everything. Safe to call twice."""
        self._groups.kill(sandbox.name)
        sandbox.control.close()
        try:
            async with asyncio.timeout(5):
                await sandbox.stage.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                sandbox.stage.kill()
            await sandbox.stage.wait()
        for relay in sandbox.relays:
            await relay.close()
        await self._groups.remove(sandbox.name)
        await sandbox.console.close()

    async def _relay(self, sandbox: Sandbox, listener: socket.socket, connect: object) -> None:
        relay = Relay(connect)  # type: ignore[arg-type]  # a lambda that binds its port
        await relay.start(listener)
        sandbox.relays.append(relay)

    def _config(self, recipe: Recipe, uid: int) -> dict[str, object]:
        return {
            "root": os.getuid() == 0,
            "uid": uid,
            "binds": recipe.binds(),
            "disk_bytes": recipe.disk_bytes,
            "inodes": _INODES,
            "ports": list(recipe.ports),
            "nft": self._nft,
            "bwrap": self._bwrap,
            "arguments": recipe.bwrap_arguments(),
            "command": list(recipe.command),
            "rlimits": recipe.rlimits(),
        }


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
