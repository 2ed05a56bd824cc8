"""QEMU's command line, its sandbox, and the VMM's end of the control port, without a virtual machine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from platform_vmm.errors import SandboxFailed
from platform_vmm.qemu.accelerator import find_accelerator
from platform_vmm.qemu.argv import OVERHEAD, VirtualMachine
from platform_vmm.qemu.driver import _dial
from platform_vmm.qemu.link import Link
from platform_vmm.rootfs.image import GuestImage
from platform_vmm.sandbox.cgroups import ControlGroups
from platform_vmm.sandbox.driver import SandboxDriver
from platform_vmm.sandbox.recipe import MIB
from platform_vmm.sandbox.relay import Relay


def machine(**change: Any) -> VirtualMachine:
    given: dict[str, Any] = {"kernel": "vmlinuz", "initrd": "initrd", "root": "root.img"}
    return VirtualMachine(**(given | {"memory_bytes": 512 * MIB, "cpus": 2, "kvm": False} | change))


def pairs(arguments: list[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(arguments))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, ("-accel", "tcg,thread=multi,tb-size=64")),
        ({}, ("-cpu", "max")),
        ({"kvm": True}, ("-accel", "kvm")),
        ({"kvm": True}, ("-cpu", "host")),
        ({}, ("-smp", "2")),
        ({"cpus": 7}, ("-smp", "7")),
        ({}, ("-m", "512M")),
        ({"memory_bytes": 300 * MIB + 1}, ("-m", "300M")),
        (
            {"more": "platform.probe"},
            ("-append", "console=ttyS0 quiet panic=-1 random.trust_cpu=on platform.probe"),
        ),
        ({}, ("-kernel", "/opt/platform/vmlinuz")),
        ({}, ("-netdev", "user,id=net,restrict=on,ipv6=off,hostfwd=tcp:10.0.2.15:11000-10.0.2.15:11000")),
    ],
)
def test_what_was_decided_is_what_qemu_is_told(change: dict[str, Any], wanted: tuple[str, str]) -> None:
    """Each decision shows in exactly one place of the command line."""
    found = pairs(machine(**change).arguments())
    assert found.count(wanted) == 1
    assert sum(flag == wanted[0] for flag, _ in found) == 1


@pytest.mark.parametrize("kvm", [False, True])
def test_every_machine_is_closed(kvm: bool) -> None:
    """No default devices, no monitor, no display, QEMU's own filter, a read-only root."""
    words = machine(kvm=kvm).arguments()
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words)
    assert ("-display", "none") in pairs(words)
    deny = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    assert ("-sandbox", deny) in pairs(words)
    assert not {"-monitor", "-qmp", "-vnc", "-incoming", "-virtfs"} & set(words)
    drives = [value for flag, value in pairs(words) if flag == "-drive"]
    assert len(drives) == 1
    assert "readonly=on" in drives[0]


def test_the_probe_has_neither_network_nor_port() -> None:
    """Only what it takes to show that user space runs."""
    assert not any("net" in word or "chardev=port" in word for word in machine(networked=False).arguments())


def test_the_sandbox_around_qemu_has_no_port_and_a_device_only_under_kvm(tmp_path: Path) -> None:
    """Memory: the machine's and QEMU's own. Nothing listens in its network namespace but QEMU."""
    recipe = machine(cpus=1).recipe(tmp_path, tmp_path)
    assert recipe.memory_bytes == 513 * MIB + OVERHEAD
    assert machine(memory_bytes=2048 * MIB, cpus=4).overhead_bytes == OVERHEAD + (4 + 3 * 4) * MIB
    assert (list(recipe.ports), list(recipe.devices)) == ([], [])
    under_kvm = machine(kvm=True).recipe(tmp_path, tmp_path, devices=["/dev/kvm"])
    words = under_kvm.bwrap_arguments()
    assert words[words.index("--dev-bind") + 2] == "/dev/kvm"


async def test_without_a_device_nothing_is_probed(tmp_path: Path) -> None:
    """TCG at once, and the reason names the device."""
    image = GuestImage(tmp_path, tmp_path, tmp_path, tmp_path, "", (), "")
    groups = ControlGroups(f"platform-vmm-test-{os.getpid()}")
    found = await find_accelerator(SandboxDriver(groups), image, tmp_path, uid=1, device=tmp_path / "kvm")
    assert (found.name, str(tmp_path / "kvm") in found.why) == ("tcg", True)
    assert list(tmp_path.iterdir()) == []


class Machine:
    """The guest's end of a link, in the test's hands."""

    def __init__(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.link = link
        self.reader = reader
        self.writer = writer

    async def say(self, line: bytes) -> None:
        self.writer.write(line + b"\n")
        await self.writer.drain()

    async def heard(self) -> Any:
        async with asyncio.timeout(10):
            return json.loads(await self.reader.readline())


@pytest.fixture
async def dialled() -> list[str]:
    return []


@pytest.fixture
async def guest(tmp_path: Path, dialled: list[str]) -> AsyncIterator[Machine]:
    async def dial(header: str) -> socket.socket:
        dialled.append(header)
        raise SandboxFailed("nobody there")

    async def nowhere() -> socket.socket:
        raise OSError

    link = Link("t", dial=dial, targets={"18080": Relay(nowhere)})
    link.config = {"stage": {}}
    await link.listen(tmp_path / "port.sock")
    reader, writer = await asyncio.open_unix_connection(tmp_path / "port.sock")
    yield Machine(link, reader, writer)
    writer.close()
    await link.close()


async def test_a_machine_that_says_hello_is_told_its_configuration(guest: Machine) -> None:
    """And once it says `up`, and later how its service ended, both are known."""
    await guest.say(b'{"hello": 1}')
    assert await guest.heard() == {"stage": {}}
    await guest.say(b'{"up": true, "walled": true}')
    assert await guest.link.up
    await guest.say(b'{"exit": 7}')
    assert await guest.link.exited == 7


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"no json",
        b'{"exit": true}',
        b'{"exit": -1}',
        b'{"open": "1", "to": "18080"}',
        b'{"open": 1}',
        b'{"usage": 1}',
        b'{"usage": {"memory_bytes": 1e9}}',
        b'{"up": 1, "x": "' + b"a" * 9000 + b'"}',
        b"\xff\xfe",
        b"[" * 3000,
    ],
)
async def test_a_machine_that_sends_what_is_no_message_is_hung_up_on(guest: Machine, line: bytes) -> None:
    """It came up no more, it ended without an exit code, and the VMM goes on."""
    await guest.say(line)
    async with asyncio.timeout(10):
        assert await guest.link.exited is None
        with pytest.raises(SandboxFailed):
            await guest.link.up
        with contextlib.suppress(ConnectionError):
            assert await guest.reader.read() == b""


async def test_a_connection_is_made_to_what_the_machine_may_reach_and_to_nothing_else(
    guest: Machine, dialled: list[str]
) -> None:
    """A port that was not given is refused without dialling; one that cannot be reached is refused too."""
    await guest.say(b'{"open": 1, "to": "22"}')
    assert await guest.heard() == {"refused": 1}
    assert dialled == []
    await guest.say(b'{"open": 2, "to": "18080"}')
    assert await guest.heard() == {"refused": 2}
    assert dialled == ["O 2\n"]


async def test_a_machine_is_told_its_configuration_once(guest: Machine) -> None:
    """It is long, and hello is short: hundreds of them are no way to the VMM's memory."""
    guest.writer.write(b'{"hello": 1}\n' * 200)
    await guest.say(b'{"open": 1, "to": "22"}')
    assert await guest.heard() == {"stage": {}}
    assert await guest.heard() == {"refused": 1}


@pytest.mark.slow(reason="fills the port until it takes no more")
async def test_a_machine_that_asks_and_reads_no_answer_has_to_wait(
    guest: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is answered lies in the port, not in the VMM's memory."""
    monkeypatch.setattr("platform_vmm.qemu.link._PACE", 0)
    asked = 0
    with contextlib.suppress(TimeoutError):
        while asked < 64 * MIB:
            guest.writer.write(b'{"open": 1, "to": "22"}\n' * 4096)
            asked += 24 * 4096
            async with asyncio.timeout(1):
                await guest.writer.drain()
    assert asked < 64 * MIB
    async with asyncio.timeout(60):
        waiting = asyncio.ensure_future(guest.writer.drain())
        while not waiting.done():  # and goes on where it reads
            assert await guest.reader.read(65536)


async def test_a_second_connection_to_the_port_is_hung_up_on(guest: Machine, tmp_path: Path) -> None:
    """QEMU makes one, at its start."""
    reader, writer = await asyncio.open_unix_connection(tmp_path / "port.sock")
    assert await reader.read() == b""
    writer.close()
    await guest.say(b'{"hello": 1}')
    assert await guest.heard() == {"stage": {}}


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK", None])
async def test_a_machine_that_answers_a_connection_with_anything_else_is_not_connected_to(
    guest: Machine, monkeypatch: pytest.MonkeyPatch, said: bytes | None
) -> None:
    """Nothing, garbage, or silence (None): the connection ends, and its descriptor with it."""
    monkeypatch.setattr("platform_vmm.qemu.driver._DIAL_TIMEOUT", 0.5)
    ended = asyncio.Event()

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"I 10000\n"
        if said is not None:
            writer.write(said)
            writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ended.set()
        writer.close()

    async with await asyncio.start_server(exchange, "127.0.0.1", 0) as server:
        ours = socket.socket()
        ours.setblocking(False)
        await asyncio.get_running_loop().sock_connect(ours, server.sockets[0].getsockname())

        async def connect(_: tuple[str, int]) -> socket.socket:
            return ours

        sandbox: Any = SimpleNamespace(control=SimpleNamespace(connect=connect))
        await guest.say(b'{"up": true}')
        await guest.link.up
        with pytest.raises((SandboxFailed, TimeoutError)):
            await _dial(sandbox, guest.link, "I 10000\n")
        async with asyncio.timeout(10):
            await ended.wait()
        assert ours.fileno() == -1
