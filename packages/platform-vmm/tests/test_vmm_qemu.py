"""Virtual machines of the local VMM: what a service finds in one, and how one begins and ends."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from guests import Guests, serial, until

from platform_vmm import guest as guest_calls
from platform_vmm.images import RUNTIME, Runtime
from platform_vmm.machine import Machine
from platform_vmm.prpc import Prpc
from platform_vmm.qemu.accelerator import probe
from platform_vmm.qemu.argv import OVERHEAD
from platform_vmm.qemu.driver import QEMU_IMAGE, QemuDriver
from platform_vmm.restarts import RestartPolicy
from platform_vmm.rootfs import GuestImage
from platform_vmm.rootfs.initrd import INIT, _archive
from platform_vmm.sandbox.driver import SandboxDriver
from platform_vmm.sandbox.recipe import MIB

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "mksquashfs"),
    pytest.mark.slow(reason="each boots virtual machines on an emulated processor"),
    pytest.mark.timeout(400),
]
PATIENCE = 180.0
SURVEY = """
import json, os, signal, socket, sys, urllib.request
def tcp(host, port):
    try:
        with socket.create_connection((host, port), timeout=5) as one:
            return one.recv(64).decode()
    except OSError as error:
        return type(error).__name__
def write(path):
    try:
        with open(path, 'w') as file:
            file.write('x')
        return 'written'
    except OSError as error:
        return os.strerror(error.errno)
def ask(method):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect('/var/run/dstack.sock')
        one.sendall(f'POST /{method} HTTP/1.1\\r\\nhost: x\\r\\ncontent-length: 2\\r\\nconnection: close\\r\\n\\r\\n{{}}'.encode())
        data = b''
        while chunk := one.recv(65536):
            data += chunk
    return json.loads(data.partition(b'\\r\\n\\r\\n')[2])
status = dict(line.split(':\\t', 1) for line in open('/proc/self/status').read().splitlines() if ':\\t' in line)
found = {
    'ids': [os.getuid(), os.getgid()],
    'capabilities': [status[name] for name in ('CapPrm', 'CapEff', 'CapBnd')],
    'no_new_privs': status['NoNewPrivs'],
    'processes': sorted(int(name) for name in os.listdir('/proc') if name.isdigit()),
    'interfaces': [name for _, name in socket.if_nameindex()],
    'devices': sorted(set(os.listdir('/dev')) & {'kvm', 'vda', 'vport1p1', 'ttyS0', 'console', 'mem'}),
    'kernel': os.uname().release,
    'config': open('/dstack/.host-shared/.user-config').read(),
    'config_mode': oct(os.stat('/dstack/.host-shared/.user-config').st_mode & 0o777),
    'writes': {path: write(path) for path in ('/usr/x', '/etc/x', '/dstack/x', '/opt/platform/x', '/srv/x',
        '/data/x', '/tmp/x', '/srv/model/x')},
    'disk': os.statvfs('/tmp').f_blocks * os.statvfs('/tmp').f_frsize,
    'denied': [len(os.listdir('/usr/share/doc')) if os.access('/usr/share/doc', os.R_OK) else 'denied'],
    'tcp': {f'{host}:{port}': tcp(host, port) for host, port in
        (('10.0.2.2', int(sys.argv[1])), ('10.0.2.2', 22), ('10.0.2.2', 11000), ('10.0.2.15', 11000),
         ('10.0.2.3', 53), ('127.0.0.1', 11000), ('1.1.1.1', 80), ('169.254.169.254', 80))},
    'agent': [ask('Version')['version'], len(ask('Info')['instance_id'])],
}
print(json.dumps(found), flush=True)
def end(*_):
    print('said goodbye', flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
with socket.create_server(('0.0.0.0', 10000)) as server:
    while True:
        one, peer = server.accept()
        with one:
            one.sendall(peer[0].encode() + b' ' + one.recv(64))
"""

CHANGES = """
import json, os, time
def write(path, mode='w'):
    try:
        with open(path, mode) as file:
            file.write('x')
        return 'written'
    except OSError as error:
        return os.strerror(error.errno)
def fill(places):
    total = 0
    for place in places:
        try:
            with open(f'{place}/fill', 'wb', buffering=0) as file:
                while True:
                    total += file.write(bytes(2**20))
        except OSError:
            continue
    return total
os.unlink('/usr/bin/sh')
found = {
    'changes': {path: write(path) for path in ('/x', '/usr/x', '/usr/bin/sh', '/etc/x', '/opt/platform/x')},
    'gone': os.path.getsize('/usr/bin/sh') == 1,
    'kept': {path: write(path, 'a') for path in ('/usr/bin/bwrap', '/dstack/.host-shared/x')},
    'total': fill(['/usr/lib', '/etc', '/opt/platform', '/tmp']),
}
print(json.dumps(found), flush=True)
print('up', flush=True)
time.sleep(6000)
"""


@pytest.fixture
def runtime_inside(guest_image: GuestImage) -> Runtime:
    return Runtime(RUNTIME, guest_image.digest, guest_image.path, guest_image.boot, guest_image.library)


@pytest.fixture
async def virtual(
    make_guests: Any, guest_image: GuestImage, runtime_inside: Runtime
) -> AsyncIterator[Guests]:
    """A VMM that has the image `local-qemu`."""
    async with make_guests(guest_image=guest_image) as guests:
        guests.runtime = runtime_inside
        guests.image = QEMU_IMAGE
        yield guests


async def test_a_service_finds_the_same_sandbox_in_a_virtual_machine(virtual: Guests, free_port: int) -> None:
    """Its user, its files, its network and its agent are those of `local-sandbox`; the kernel is another.

    Then: the way in, what SysInfo tells, and ShutdownVm, which the service hears as SIGTERM.
    """
    policy = {
        "read_only": True,
        "allowed_paths": ["/srv/model"],
        "denied_paths": ["/usr/share/doc"],
        "tmpfs_size_mb": 48,
    }
    config = json.dumps({"filesystem": policy})
    command = [virtual.runtime.boot[0], "-I", "-c", SURVEY, str(virtual.guest_port)]
    ports = [{"host_port": free_port, "vm_port": 10000}]
    machine = virtual.create(command, user_config=config, ports=ports)
    await until(lambda: '"agent"' in serial(machine) or machine.state != "running", machine, PATIENCE)
    assert machine.state == "running", machine.boot_error
    found = next(json.loads(line) for line in serial(machine).splitlines() if line.startswith("{"))
    assert found["ids"] == [1000, 1000]
    assert set(found["capabilities"]) == {"0000000000000000"}
    assert found["no_new_privs"] == "1"
    assert found["processes"] == [1, 2]
    assert found["interfaces"] == ["lo"]
    assert found["devices"] == []
    assert found["kernel"] != Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert (found["config"], found["config_mode"]) == (config, "0o400")
    written = {path for path, told in found["writes"].items() if told == "written"}
    assert written == {"/data/x", "/tmp/x", "/srv/model/x"}
    assert set(found["writes"].values()) == {"written", "Read-only file system"}
    assert found["disk"] == 48 * 1024**2
    assert found["denied"] == ["denied"]
    tcp = found["tcp"]
    assert tcp.pop(f"10.0.2.2:{virtual.guest_port}") == "validator"
    assert set(tcp.values()) == {"ConnectionRefusedError", "OSError"}, tcp
    assert found["agent"][1] == 40
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(_call(free_port, f"number {number}") for number in range(8)))
    assert answers == [f"10.0.2.2 number {number}" for number in range(8)]
    await until(lambda: machine.usage().memory_bytes, machine, 60)
    usage = machine.usage()
    shown = guest_calls.sys_info(machine.configuration, usage)
    assert 0 < shown["used_memory"] < shown["total_memory"]
    assert shown["disks"][0]["total_size"] == 48 * 1024**2
    assert usage.cpu_time_ms is None or usage.cpu_time_ms > 0
    assert usage.rx_bytes > len("validator")
    assert machine.guest is not None
    assert 32 * MIB < _beyond_its_memory(_emulators(machine.guest.pid)[0], 256 * MIB) < OVERHEAD
    machine.shutdown()
    await until(lambda: machine.state == "stopped", machine, PATIENCE)
    assert "said goodbye" in serial(machine)
    assert any(event["body"].startswith("exit code 7") for event in machine.events)


async def _call(port: int, text: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text.encode())
    answer = await reader.read()
    writer.close()
    return answer.decode()


@pytest.mark.needs("root")
async def test_machines_are_brought_back_and_end_when_they_are_too_old(
    make_guests: Any,
    guest_image: GuestImage,
    runtime_inside: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two at once, each QEMU a user of its own, one of them with a writable root.

    One is killed from outside, is `exited`, and started again; the other, not touched by that, is stopped
    and started by the API. They come back without the modules of a packet filter, and so it is told. Last
    the hard lifetime of one is over.
    """
    async with make_guests(guest_image=guest_image, restarts=RestartPolicy(first=1.0)) as virtual:
        virtual.runtime, virtual.image = runtime_inside, QEMU_IMAGE
        sleeper = [
            runtime_inside.boot[0],
            "-I",
            "-c",
            "import time; print('up', flush=True); time.sleep(6000)",
        ]
        killed = virtual.create(sleeper)
        policy = {"read_only": False, "tmpfs_size_mb": 32}
        config = json.dumps({"filesystem": policy, "hard_lifetime_s": 86_400})
        other = virtual.create(CHANGES, user_config=config)
        both = (killed, other)
        for machine in both:
            await until(partial(_says, machine, "up"), machine, PATIENCE)
        emulators = [_emulators(machine.guest.pid)[0] for machine in both if machine.guest]
        assert len({process.uids().real for process in emulators}) == 2
        assert all(process.uids().real >= 300_000 for process in emulators)
        assert all(machine.guest and machine.guest.walled for machine in both)
        _changed_what_it_may(next(line for line in serial(other).splitlines() if line.startswith("{")))

        offered = virtual.machines.images.find(QEMU_IMAGE)
        assert isinstance(offered.driver, QemuDriver)
        offered.driver._image = _without_packet_filter(guest_image, tmp_path / "unwalled")
        emulators[0].send_signal(signal.SIGKILL)
        await until(lambda: killed.state == "exited", killed)
        assert "killed with its stage" in str(killed.events)
        assert other.state == "running"
        other.stop()
        await until(lambda: other.state == "stopped", other)
        await until(lambda: not any(process.is_running() for process in emulators))
        other.start()
        for machine in both:
            await until(partial(_says, machine, "up", times=2), machine, PATIENCE)
            assert machine.state == "running"
            assert "vm.unwalled" in str(machine.events)

        late = SimpleNamespace(monotonic=lambda: time.monotonic() + 90_000, time=time.time)
        monkeypatch.setattr("platform_vmm.machine.time", late)
        await until(lambda: other.state == "stopped", other)
        assert "vm.lifetime" in str(other.events)
        assert killed.state == "running"


def _changed_what_it_may(line: str) -> None:
    found = json.loads(line)
    assert set(found["changes"].values()) == {"written"}, found
    assert found["gone"]
    assert set(found["kept"].values()) <= {"Permission denied", "Read-only file system"}
    assert 16 * 2**20 < found["total"] <= 32 * 2**20


def _without_packet_filter(image: GuestImage, folder: Path) -> GuestImage:
    """The same, but for an initrd that loads no module of the packet filter."""
    folder.mkdir()
    for path in (image.kernel, image.root):
        (folder / path.name).hardlink_to(path)
    plain, loads = image.initrd.read_bytes(), "do\n  $b insmod"
    script = INIT.read_text()
    assert loads in script
    script = script.replace(loads, loads.replace("do", 'do\n  case "$module" in nf*) continue ;; esac', 1))
    later = b"".join(_archive([("init", 0o100755, script.encode())]))
    (folder / "initrd").write_bytes(plain + bytes(-len(plain) % 4) + later)
    files = {name: folder / getattr(image, name).name for name in ("kernel", "initrd", "root")}
    return replace(image, path=folder, **files)


async def test_a_boot_takes_no_longer_than_the_machine_may_live_or_is_wanted(virtual: Guests) -> None:
    """Too old, and removed: at once, not when it is up or its boot timed out; nothing of it is left."""
    aged = virtual.create(["sleep", "600"], user_config=json.dumps({"hard_lifetime_s": 0.5}))
    await until(lambda: aged.state == "stopped", aged)
    assert "vm.lifetime" in str(aged.events)
    assert aged.boot_error == ""
    machine = virtual.create(["sleep", "600"])
    await until(lambda: machine.boot_progress == "starting containers" and _emulators(), machine)
    emulator = _emulators()[0]
    machine.remove()
    await until(lambda: machine not in virtual.machines.all(), machine)
    assert not emulator.is_running()
    assert not machine.folder.exists()


async def test_a_kernel_that_panics_is_a_boot_error_with_the_end_of_its_console(
    virtual: Guests, guest_image: GuestImage, tmp_path: Path
) -> None:
    """An initrd that is none: the kernel says so on the console, and the machine ends."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (guest_image.kernel, guest_image.root):
        (broken / path.name).hardlink_to(path)
    (broken / "initrd").write_bytes(bytes(4096))
    files = {name: broken / getattr(guest_image, name).name for name in ("kernel", "initrd", "root")}
    offered = virtual.machines.images.find(QEMU_IMAGE)
    assert isinstance(offered.driver, QemuDriver)
    offered.driver._image = replace(guest_image, path=broken, **files)
    machine = virtual.create(["sleep", "600"])
    await until(lambda: machine.state == "exited", machine, PATIENCE)
    assert "Kernel panic" in machine.boot_error
    assert "Unable to mount root fs" in machine.boot_error


async def test_the_image_tells_its_level_its_runtime_and_its_accelerator(
    virtual: Guests, guest_image: GuestImage
) -> None:
    """Where no guest comes up under KVM, it is emulated, and said to be."""
    listed = Prpc(virtual.machines).call("ListImages", {})["images"]
    told = {image["name"]: json.loads(image["description"]) for image in listed}
    mine = told[QEMU_IMAGE]
    assert mine["isolation_level"] == "Vm"
    assert mine["runtimes"] == {RUNTIME: guest_image.digest}
    assert ("kvm: " in mine["note"]) is not any("no KVM" in text for text in mine["weaker"])
    assert told["local-sandbox"]["isolation_level"] == "Container"


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="no /dev/kvm: nothing is probed")
async def test_a_probe_that_hangs_ends_in_time_and_leaves_nothing(
    bench: Any, guest_image: GuestImage, tmp_path: Path
) -> None:
    """A processor without what the kernel needs never shows its user space; its QEMU is killed."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    found = await probe(
        SandboxDriver(bench.groups),
        guest_image,
        tmp_path,
        uid=2_390_000,
        patience=0.5,
        processor="host,-arch-capabilities",
    )
    assert not found.kvm
    assert loop.time() - began < 30
    assert not [one for one in psutil.process_iter() if one.uids().real == 2_390_000]
    assert not (tmp_path / "probe").exists()


def _says(machine: Machine, word: str, times: int = 1) -> bool:
    """Over all boots together."""
    return serial(machine).split().count(word) >= times


def _beyond_its_memory(emulator: psutil.Process, memory: int) -> int:
    """Bytes that a QEMU has besides the mapping that is its guest's memory."""
    found = 0
    for mapping in emulator.memory_maps(grouped=False):
        first, last = (int(end, 16) for end in mapping.addr.split("-"))
        if last - first != memory:
            found += mapping.rss
    return found


def _emulators(root: int | None = None) -> list[psutil.Process]:
    """The QEMUs below a process, ours by default."""
    below = psutil.Process(root).children(recursive=True)
    return [one for one in below if one.is_running() and one.name().startswith("qemu-system")]
