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
from functools import partial
from pathlib import Path

from platform_vmm.errors import SandboxFailed
from platform_vmm.sandbox.cgroups import ControlGroups, Limits
from platform_vmm.sandbox.console import Console
from platform_vmm.sandbox.control import Control, make_pair
from platform_vmm.sandbox.recipe import NAMESPACES, Recipe
from platform_vmm.sandbox.relay import Connect, Relay, loopback
from platform_vmm.sandbox.syscalls import guest_filter

_STAGE = Path(__file__).with_name("stage.py")
_GUEST = "10.0.2.15"
_START_TIMEOUT = 30.0
_END_TIMEOUT = 5.0
_OOM_SCORE = 300


@dataclass(slots=True)
class Sandbox:
    """A running sandbox. `pid` is bubblewrap's, as the host sees it; `walled`: the packet filter is on."""

    name: str
    pid: int
    walled: bool
    control: Control
    console: Console
    stage: asyncio.subprocess.Process
    groups: ControlGroups
    relays: list[Relay] = field(default_factory=list)

    async def exited(self) -> int | None:
        """Wait for its end: the guest's exit code, or None when the stage went first."""
        return await asyncio.shield(self.control.exited)

    def terminate(self) -> None:
        """SIGTERM to the guest's first process; whether it heeds it shows in `exited`."""
        with contextlib.suppress(SandboxFailed):
            self.control.send(b"T")

    def oom_kills(self) -> int:
        """How many of its processes the kernel killed for memory, where it counts them."""
        return self.groups.usage(self.name).get("oom_kills", 0)


class SandboxDriver:
    """Makes sandboxes for one VMM. `groups` limits them; as root each gets a uid of its own."""

    def __init__(self, groups: ControlGroups) -> None:
        self._groups = groups
        self._bwrap = _program("bwrap")
        self._nft = _program("nft")
        self._filter = guest_filter()

    @property
    def missing(self) -> str | None:
        """What the driver needs and this machine lacks, with what to do; None when all is there."""
        if self._bwrap is None:
            return "bubblewrap is not installed: install the package bubblewrap (bwrap on PATH)"
        return None

    @property
    def weaker(self) -> list[str]:
        """Guarantees of the sandbox that this machine, or running without root, does not give."""
        found = {
            "no uid of its own: the guest's processes are the VMM's user's": os.getuid() != 0,
            "no control groups: memory and CPU are not limited, processes by RLIMIT_NPROC only": (
                not self._groups.limits_hold
            ),
            "no packet filter: the empty network namespace is the only wall": self._nft is None,
            "no system call filter for this machine": self._filter is None,
        }
        return [text for text, true in found.items() if true]

    async def start(
        self, name: str, recipe: Recipe, *, uid: int, log: Path, forwards: list[tuple[socket.socket, int]]
    ) -> Sandbox:
        """Start a sandbox. `forwards`: listening host sockets, each with the guest's port behind it.

        The sockets are the sandbox's from now on, also when this fails.

        Raises:
            SandboxFailed: It could not be made; nothing of it is left.
        """
        waiting = [listener for listener, _ in forwards]
        try:
            sandbox, log_end = await self._spawn(name, log)
        except BaseException:
            _close(waiting)
            raise
        try:
            self._send_config(sandbox.control, recipe, uid, log_end)
            self._groups.create(name, Limits(recipe.memory_limit, recipe.cpus, recipe.pids))
            async with asyncio.timeout(_START_TIMEOUT):
                told, listeners = await asyncio.shield(sandbox.control.started)
                waiting += listeners
                sandbox.pid, sandbox.walled = int(told["pid"]), bool(told["walled"])
                await asyncio.to_thread(self._groups.attach, name, sandbox.pid)
                for listener, port in zip(listeners, recipe.ports, strict=True):
                    await _relay(sandbox, listener, loopback(port))
                for listener, port in forwards:
                    await _relay(sandbox, listener, partial(sandbox.control.connect, (_GUEST, port)))
            waiting.clear()
            sandbox.control.send(b"go")
        except BaseException as error:
            _close(waiting)
            await self.destroy(sandbox)
            if isinstance(error, SandboxFailed | OSError):
                reason = str(error) or type(error).__name__
                raise SandboxFailed(f"the sandbox {name} could not be started: {reason}") from error
            raise
        finally:
            os.close(log_end)
        return sandbox

    async def destroy(self, sandbox: Sandbox) -> None:
        """Kill the whole tree and free everything. Safe to call again.

        Raises:
            TimeoutError: Something of it does not die.
        """
        self._groups.kill(sandbox.name)
        sandbox.control.close()
        try:
            async with asyncio.timeout(_END_TIMEOUT):
                await sandbox.stage.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                sandbox.stage.kill()
            await sandbox.stage.wait()
        for relay in sandbox.relays:
            await relay.close()
        sandbox.relays.clear()
        await sandbox.console.close()
        await self._groups.remove(sandbox.name)

    async def _spawn(self, name: str, log: Path) -> tuple[Sandbox, int]:
        console = Console(log)
        ours, theirs = make_pair()
        log_end = console.attach(name)
        try:
            stage = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", str(_STAGE), str(theirs)),
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
        return Sandbox(name, 0, False, control, console, stage, self._groups), log_end

    def _send_config(self, control: Control, recipe: Recipe, uid: int, log_end: int) -> None:
        config = {
            "root": os.getuid() == 0,
            "uid": uid,
            "binds": recipe.binds(),
            "disk_bytes": recipe.disk_bytes,
            "inodes": recipe.inodes,
            "folders": list(recipe.places()),
            "ports": list(recipe.ports),
            "nft": self._nft,
            "bwrap": self._bwrap,
            "arguments": recipe.bwrap_arguments(filtered=self._filter is not None),
            "filter": "" if self._filter is None else self._filter.hex(),
            "command": list(recipe.command),
            "rlimits": recipe.rlimits(),
            "namespaces": NAMESPACES,
            "oom_score": _OOM_SCORE,
        }
        document = os.memfd_create("config", os.MFD_CLOEXEC)
        try:
            with os.fdopen(document, "wb", closefd=False) as file:
                file.write(json.dumps(config).encode())
            os.lseek(document, 0, os.SEEK_SET)
            control.send(b"config", [document, log_end])
        finally:
            os.close(document)


async def _relay(sandbox: Sandbox, listener: socket.socket, connect: Connect) -> None:
    relay = Relay(connect)
    await relay.start(listener)
    sandbox.relays.append(relay)


def _close(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
