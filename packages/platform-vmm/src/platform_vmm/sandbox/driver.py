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
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil

from platform_vmm.driver import Usage
from platform_vmm.errors import SandboxFailed
from platform_vmm.sandbox.cgroups import ControlGroups, Limits
from platform_vmm.sandbox.console import Console
from platform_vmm.sandbox.control import Control, make_pair
from platform_vmm.sandbox.namespaces import namespaces_refused
from platform_vmm.sandbox.recipe import NAMESPACES, ROOM, Recipe
from platform_vmm.sandbox.relay import Connect, Relay, loopback
from platform_vmm.sandbox.syscalls import guest_filter

STAGE = Path(__file__).with_name("stage.py")
"""The program that makes a sandbox, on the host and in a virtual machine alike."""
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
    outward: list[Relay] = field(default_factory=list)
    """Those of the relays that the guest itself connects to."""

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

    def usage(self) -> Usage:
        """What it uses, and used since its start, as its control groups count it.

        Without groups: what the kernel knows of the processes that live, and no peak.
        """
        counted = self.groups.usage(self.name)
        if not {"cpu_time_ms", "memory_bytes"} <= counted.keys():
            counted = _of_processes(self.stage.pid) | counted
        total, free = _disk(self.stage.pid)
        received = sum(relay.back if relay in self.outward else relay.forth for relay in self.relays)
        carried = sum(relay.forth + relay.back for relay in self.relays)
        return Usage(
            cpu_time_ms=counted.get("cpu_time_ms"),
            memory_bytes=counted.get("memory_bytes", 0),
            memory_peak_bytes=counted.get("memory_peak_bytes"),
            disk_total_bytes=total,
            disk_free_bytes=free,
            rx_bytes=received,
            tx_bytes=carried - received,
        )

    async def relay(self, listener: socket.socket, connect: Connect) -> Relay:
        """Join what connects to a listener, ours from now on, with what `connect` makes."""
        relay = Relay(connect)
        self.relays.append(relay)
        await relay.start(listener)
        return relay

    async def destroy(self) -> None:
        """Kill the whole tree and free everything. Safe to call again.

        Raises:
            TimeoutError: Something of it does not die.
        """
        self.groups.kill(self.name)
        self.control.close()
        try:
            async with asyncio.timeout(_END_TIMEOUT):
                await self.stage.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.stage.kill()
            await self.stage.wait()
        for relay in self.relays:
            await relay.close()
        self.relays.clear()
        await self.console.close()
        await self.groups.remove(self.name)


class SandboxDriver:
    """Makes sandboxes for one VMM. `groups` limits them; as root each gets a uid of its own."""

    def __init__(self, groups: ControlGroups) -> None:
        self._groups = groups
        self._bwrap = _program("bwrap")
        self._nft = _program("nft")
        self._filter = guest_filter()

    @property
    def level(self) -> str:
        """Namespaces wherever it runs at all."""
        return "Container"

    @property
    def note(self) -> str:
        """For people."""
        return "a sandbox on this host's kernel; not a TEE"

    @cached_property
    def missing(self) -> str | None:
        """What the driver needs and this machine lacks, with what to do; None when all is there.

        Without namespaces there is no sandbox of less isolation: it is refused.
        """
        if self._bwrap is None:
            return "bubblewrap is not installed: install the package bubblewrap (bwrap on PATH)"
        return namespaces_refused()

    @property
    def weaker(self) -> list[str]:
        """Guarantees of the sandbox that this machine, or running without root, does not give."""
        found = {
            "no uid of its own: whoever left a guest's namespaces would be the VMM's user": os.getuid() != 0,
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
                    waiting.remove(listener)
                    sandbox.outward.append(await sandbox.relay(listener, loopback(port)))
                for listener, port in forwards:
                    waiting.remove(listener)
                    await sandbox.relay(listener, partial(sandbox.control.connect, (_GUEST, port)))
            sandbox.control.send(b"go")
        except BaseException as error:
            _close(waiting)
            await sandbox.destroy()
            if isinstance(error, SandboxFailed | OSError):
                reason = str(error) or type(error).__name__
                raise SandboxFailed(f"the sandbox {name} could not be started: {reason}") from error
            raise
        finally:
            os.close(log_end)
        return sandbox

    async def _spawn(self, name: str, log: Path) -> tuple[Sandbox, int]:
        console = Console(log)
        ours, theirs = make_pair()
        log_end = console.attach(name)
        try:
            stage = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", str(STAGE), str(theirs)),
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
        config = stage_config(recipe, uid=uid, system_filter=self._filter, root=os.getuid() == 0)
        config |= {"nft": self._nft, "bwrap": self._bwrap}
        document = os.memfd_create("config", os.MFD_CLOEXEC)
        try:
            with os.fdopen(document, "wb", closefd=False) as file:
                file.write(json.dumps(config).encode())
            os.lseek(document, 0, os.SEEK_SET)
            control.send(b"config", [document, log_end])
        finally:
            os.close(document)


def stage_config(recipe: Recipe, *, uid: int, system_filter: bytes | None, root: bool) -> dict[str, Any]:
    """What the stage program is told, but for where this machine has its programs `nft` and `bwrap`."""
    return {
        "root": root,
        "uid": uid,
        "binds": recipe.binds(),
        "disk_bytes": recipe.writable_bytes,
        "inodes": recipe.inodes,
        "folders": list(recipe.places()),
        "devices": list(recipe.devices),
        "ports": list(recipe.ports),
        "arguments": recipe.bwrap_arguments(),
        "closing": recipe.closing_arguments(filtered=system_filter is not None),
        "writable": recipe.writable_root(),
        "copies": recipe.copies(),
        "denied": list(recipe.filesystem.denied_paths),
        "filter": "" if system_filter is None else system_filter.hex(),
        "command": list(recipe.command),
        "rlimits": recipe.rlimits(),
        "namespaces": NAMESPACES,
        "oom_score": _OOM_SCORE,
    }


def _of_processes(stage: int) -> dict[str, int]:
    """CPU time and resident memory of a stage's descendants; one that ends in between counts no more."""
    seconds, resident = 0.0, 0
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(stage).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
                resident += process.memory_info().rss
    return {"cpu_time_ms": int(seconds * 1000), "memory_bytes": resident}


def _disk(stage: int) -> tuple[int, int]:
    """Size and free bytes of the guest's disk, as the stage has it mounted."""
    try:
        found = os.statvfs(f"/proc/{stage}/root{ROOM}/disk")
    except OSError:
        return 0, 0
    return found.f_blocks * found.f_frsize, found.f_bfree * found.f_frsize


def _close(listeners: list[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
