"""One sandbox: what it may see, reach and use, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import psutil
import pytest
from running_vmm import UID, Bench

from platform_vmm.errors import SandboxFailed
from platform_vmm.images import Runtime
from platform_vmm.sandbox.cgroups import ControlGroups
from platform_vmm.sandbox.driver import SandboxDriver
from platform_vmm.sandbox.recipe import MIB, Recipe

needs_root = pytest.mark.needs("root", why="guests have uids of their own")


async def test_the_guest_is_uid_1000_without_capabilities(bench: Bench) -> None:
    code, text = await bench.run("import os; print(os.getuid(), open('/proc/self/status').read())")
    assert code == 0
    assert text.startswith("1000 ")
    assert "CapEff:\t0000000000000000" in text


async def test_no_path_of_the_host_is_visible(bench: Bench) -> None:
    script = "import os; print(open('/proc/1/cmdline').read(), os.listdir('/'), open('/proc/self/mountinfo').read())"
    _, text = await bench.run(script)
    assert str(bench.folder) not in text.split("\n")[0]
    assert "/home" not in text.split("\n")[0]


async def test_the_guest_sees_only_its_own_processes(bench: Bench) -> None:
    _, text = await bench.run("import os; print(sorted(int(n) for n in os.listdir('/proc') if n.isdigit()))")
    assert text.strip() in ("[1, 2]", "[1, 2, 3]")


async def test_the_system_is_read_only_and_the_disk_is_not(bench: Bench) -> None:
    script = """
for path in ('/x', '/usr/x', '/etc/x', '/opt/platform/x', '/dev/x', '/tmp/x', '/root/x', '/data/x', '/var/tmp/x'):
    try:
        open(path, 'w').write('x'); print(path, 'written')
    except OSError as error:
        print(path, error.strerror)
"""
    _, text = await bench.run(script)
    written = [line.split()[0] for line in text.splitlines() if line.endswith("written")]
    assert written == ["/tmp/x", "/root/x", "/data/x", "/var/tmp/x"]


async def test_nothing_is_reachable_but_the_relayed_ports(bench: Bench) -> None:
    """The reachability table: host loopback, other ports, the internet, IPv6, raw sockets, metadata."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    script = f"""
import socket
def tcp(host, port):
    try:
        with socket.create_connection((host, port), 2) as s: return s.recv(5).decode() or 'closed'
    except OSError as e: return type(e).__name__
print('relayed', tcp('10.0.2.2', {port}))
print('loopback', tcp('127.0.0.1', {port}))
print('other', tcp('10.0.2.2', 22))
print('internet', tcp('1.1.1.1', 80))
print('metadata', tcp('169.254.169.254', 80))
for name, family, kind, proto in (('ipv6', socket.AF_INET6, socket.SOCK_STREAM, 0), ('raw', socket.AF_INET, socket.SOCK_RAW, 1), ('packet', socket.AF_PACKET, socket.SOCK_RAW, 0)):
    try:
        s = socket.socket(family, kind, proto); s.connect(('::1', {port})); print(name, 'reached')
    except OSError as e: print(name, type(e).__name__)
"""
    async with server:
        _, text = await bench.run(script, ports=[port])
    seen = dict(line.split() for line in text.splitlines())
    assert seen.pop("relayed") == "hello"
    assert all(word.endswith("Error") for word in seen.values()), seen


async def test_a_second_sandbox_nests_inside_with_its_own_view(bench: Bench) -> None:
    script = """
import subprocess
args = ['bwrap', '--unshare-user', '--unshare-pid', '--unshare-ipc', '--unshare-net', '--uid', '0', '--gid', '0', '--disable-userns', '--die-with-parent',
 '--cap-drop', 'ALL', '--ro-bind', '/usr', '/usr', '--symlink', 'usr/bin', '/bin', '--symlink', 'usr/lib', '/lib',
 '--symlink', 'usr/lib64', '/lib64', '--proc', '/proc', '--dev', '/dev', '/bin/sh', '-c', 'echo $(ls -d /proc/[0-9]*); ls /dstack /opt 2>&1']
done = subprocess.run(args, capture_output=True, text=True); print(done.stdout, done.stderr)
"""
    _, text = await bench.run(script)
    assert "/proc/1" in text
    assert "cannot access '/dstack'" in text
    assert "cannot access '/opt'" in text


@needs_root
async def test_memory_is_limited_for_the_whole_tree(bench: Bench) -> None:
    script = "print('begun', flush=True); b = bytearray(600 * 2**20); print('got it')"
    code, text = await bench.run(script)
    assert "begun" in text
    assert "got it" not in text
    assert code == 137


@needs_root
async def test_processes_are_limited(bench: Bench) -> None:
    script = """
import os, time
made = 0
try:
    while made < 500:
        if os.fork() == 0: time.sleep(60)
        made += 1
except OSError: pass
print('made', made, flush=True); os._exit(0)
"""
    _, text = await bench.run(script)
    made = int(text.split()[-1])
    assert 10 < made < 64


async def test_the_disk_has_one_cap_over_all_writable_places(bench: Bench) -> None:
    script = """
total = 0
for path in ('/tmp/a', '/data/b', '/root/c', '/dev/shm/d'):
    try:
        with open(path, 'wb', buffering=0) as f:
            while True: total += f.write(bytes(2**20))
    except OSError: pass
print(total)
"""
    _, text = await bench.run(script)
    assert 60 * MIB <= int(text) <= 64 * MIB


async def test_the_console_keeps_a_cap_and_never_blocks_the_guest(bench: Bench) -> None:
    script = "import sys\nfor _ in range(200): sys.stdout.write('x' * 100_000)\nsys.exit(7)"
    code, text = await bench.run(script)
    assert code == 7
    assert len(text) < 4 * MIB + 200
    assert "bytes more were written and not kept" in text


@needs_root
async def test_twenty_cycles_leave_nothing(bench: Bench) -> None:
    """Every second one is killed while its tree ignores signals and has left its session."""
    stubborn = "import os, signal, time\nsignal.signal(15, signal.SIG_IGN)\n[os.setsid() for _ in range(1) if os.fork() == 0]\nprint('up', flush=True); time.sleep(60)"
    mounts = Path("/proc/self/mountinfo").read_text()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for cycle in range(20):
        if cycle % 2:
            await bench.run("print('done')")
        else:
            with pytest.raises(TimeoutError):
                await bench.run(stubborn, timeout=0.3)
    uids = [p.info["uids"].real for p in psutil.process_iter(["uids"]) if p.info["uids"]]
    assert UID not in uids
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 1
    assert bench.groups.leftovers() == []


async def test_a_failed_start_names_the_step_and_leaves_nothing(bench: Bench) -> None:
    with pytest.raises(SandboxFailed, match=r"mounts|namespaces"):
        await bench.run("", image=bench.folder / "absent")
    assert bench.groups.leftovers() == []


async def test_a_forwarded_host_port_leads_to_the_guests_port(
    bench: Bench, runtime: Runtime, tmp_path: Path
) -> None:
    del runtime, tmp_path
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.setblocking(False)
    groups: ControlGroups = bench.groups
    driver = SandboxDriver(groups)
    assert driver.missing is None
    script = "import socket; s = socket.create_server(('0.0.0.0', 10000)); c, _ = s.accept(); c.sendall(b'inside'); c.close()"
    shared = bench.folder / "shared"
    shared.mkdir()
    (shared / "dstack.sock").touch()
    recipe = Recipe(
        command=[bench.runtime.boot[0], "-c", script],
        environment={},
        image=bench.runtime.path,
        shared=shared,
        memory_bytes=128 * MIB,
        disk_bytes=16 * MIB,
        cpus=1,
        pids=32,
    )
    sandbox = await driver.start(
        "fwd", recipe, uid=UID + 1, log=bench.folder / "log", forwards=[(listener, 10000)]
    )
    try:
        async with asyncio.timeout(15):
            while True:
                data = b""
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    data = await reader.read()
                    writer.close()
                if data:
                    break
                await asyncio.sleep(0.05)
    finally:
        await sandbox.destroy()
    assert data == b"inside"
