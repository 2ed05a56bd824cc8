"""What a guest can reach, read and change: the reachability table, from inside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from guests import Guests, until

from platform_vmm.sandbox.driver import Sandbox

PROBE = """
import ctypes, errno, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def name(error): return errno.errorcode.get(error.errno, str(error)) if error.errno else type(error).__name__
def tcp(host, port, family=socket.AF_INET):
    try:
        with socket.socket(family, socket.SOCK_STREAM) as s:
            s.settimeout(3)
            s.connect((host, port))
            return s.recv(64).decode()
    except OSError as error:
        return name(error)
def udp(host):
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(1)
            s.connect((host, 53))
            s.send(b'x')
            return s.recv(1).decode()
    except OSError as error:
        return name(error)
def make(*args):
    try:
        socket.socket(*args).close()
        return 'made'
    except OSError as error:
        return name(error)
def unix(path):
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(path)
            return 'connected'
    except OSError as error:
        return name(error)
def write(path):
    try:
        with open(path, 'a') as file:
            file.write('x')
        return 'written'
    except OSError as error:
        return name(error)
def call(name, *args):
    return errno.errorcode.get(ctypes.get_errno(), 'ok') if getattr(libc, name)(*args) < 0 else 'ok'
"""


@pytest.fixture
async def echo(guest_port: int) -> AsyncIterator[int]:
    """A host port beside the guest port that says hello to whoever comes, and must not be reached."""

    async def hello(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"host")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(hello, "127.0.0.1", 0) as server:
        yield int(server.sockets[0].getsockname()[1])


@pytest.mark.robustness(
    23, "metadata", "host-loopback", "other-vms", "vmm-api", "dns-tunnel", "ipv6", "no-way-out"
)
async def test_a_guest_reaches_the_given_port_at_10_0_2_2_and_nothing_else(guests: Guests, echo: int) -> None:
    """The reachability table: one door; the host, its network, metadata, UDP and IPv6 are not there."""
    with socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0vmm-test-{os.getpid()}")
        abstract.listen()
        found = await guests.run(
            PROBE
            + f"""
print(json.dumps({{
    'door': tcp('10.0.2.2', {guests.guest_port}),
    'other port of the host': tcp('10.0.2.2', {echo}),
    'loopback': tcp('127.0.0.1', {echo}),
    'ssh': tcp('10.0.2.2', 22),
    'internet': tcp('1.1.1.1', 443),
    'metadata': tcp('169.254.169.254', 80),
    'slirp dns': tcp('10.0.2.3', 53),
    'udp out': udp('8.8.8.8'),
    'udp host': udp('10.0.2.2'),
    'ipv6': tcp('::1', {echo}, socket.AF_INET6),
    'ipv6 out': tcp('2606:4700::1111', 443, socket.AF_INET6),
    'abstract': unix('\\0vmm-test-{os.getpid()}'),
}}))
"""
        )
    assert found.pop("door") == "validator"
    assert found.pop("other port of the host") == "ECONNREFUSED"
    assert found.pop("loopback") == "ECONNREFUSED"
    assert found.pop("ssh") == "ECONNREFUSED"
    assert found.pop("abstract") == "ECONNREFUSED"
    assert found.pop("udp host") == "ECONNREFUSED"
    assert set(found.values()) <= {"ENETUNREACH", "EADDRNOTAVAIL", "EHOSTUNREACH"}, found


@pytest.mark.robustness(23, "raw-sockets")
async def test_a_guest_can_make_no_raw_packet_or_vsock_socket(guests: Guests) -> None:
    """AF_VSOCK above all: it is in no network namespace and would reach the hypervisor."""
    found = await guests.run(
        PROBE
        + """
print(json.dumps({
    'vsock': make(40, socket.SOCK_STREAM), 'packet': make(17, socket.SOCK_RAW),
    'raw': make(socket.AF_INET, socket.SOCK_RAW, 1), 'alg': make(38, socket.SOCK_SEQPACKET),
    'nfnetlink': make(16, socket.SOCK_RAW, 12), 'route': make(16, socket.SOCK_RAW, 0),
}))
"""
    )
    assert found.pop("route") == "made"
    assert found.pop("raw") == "EPERM"
    assert set(found.values()) == {"EAFNOSUPPORT"}, found


async def test_a_guest_cannot_change_its_system_or_the_kernel(guests: Guests) -> None:
    """No capability, no writable system file, no sysctl, no mount in its own namespaces, no tracing."""
    found = await guests.run(
        PROBE
        + """
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(json.dumps({
    'caps': [status[k].strip() for k in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')],
    'nnp': status['NoNewPrivs'].strip(), 'seccomp': status['Seccomp'].strip(), 'uid': os.getuid(),
    'score': open('/proc/self/oom_score_adj').read().strip(),
    'files': [write(p) for p in ('/usr/x', '/etc/passwd', '/x', '/dev/x', '/opt/platform/x',
                                 '/dstack/app-compose.json', '/dstack/.host-shared/.user-config')],
    'sysctl': [write(p) for p in ('/proc/sys/kernel/core_pattern', '/proc/sys/vm/overcommit_memory',
                                  '/proc/sys/net/ipv4/ip_forward', '/proc/sysrq-trigger')],
    'mount': call('mount', b'none', b'/tmp', b'tmpfs', 0, None),
    'ptrace': call('ptrace', 16, 1, 0, 0), 'chroot': call('chroot', b'/tmp'),
}))
"""
    )
    assert found["caps"] == ["0000000000000000"] * 5
    assert found["uid"] == 1000
    assert found["nnp"] == "1"
    assert found["seccomp"] == "2"
    assert found["score"] == "300"
    assert set(found["files"]) <= {"EROFS", "EACCES"}
    assert set(found["sysctl"]) <= {"EROFS", "EACCES", "ENOENT"}
    assert (found["mount"], found["ptrace"], found["chroot"]) == ("EPERM", "EPERM", "EPERM")


async def test_a_guest_sees_its_own_world_only(guests: Guests, tmp_path: Path) -> None:
    """Its processes, three descriptors, no path of the host in a command line, no control groups, no /sys."""
    found = await guests.run(
        PROBE
        + """
print(json.dumps({
    'pids': sorted(int(p) for p in os.listdir('/proc') if p.isdigit()),
    'fds': sorted(int(f) for f in os.listdir('/proc/self/fd'))[:-1],
    'one': open('/proc/1/cmdline').read(), 'environ': sorted(os.environ),
    'root': sorted(os.listdir('/')), 'host': os.uname().nodename,
    'stdin': os.readlink('/proc/self/fd/0'),
    'cgroup': open('/proc/self/cgroup').read(),
}))
""",
        user_config='{"secret": 1}',
    )
    assert found["pids"] == [1, 2]
    assert found["fds"] == [0, 1, 2]
    assert found["stdin"] == "/dev/null"
    assert str(tmp_path) not in found["one"]
    assert "--args" in found["one"]
    assert "platform-vmm" not in found["cgroup"]
    assert found["host"] == "vm"
    assert not {"sys", "home", "work", "mnt", "boot"} & set(found["root"])
    assert "PATH" in found["environ"]


async def test_a_guest_finds_user_config_compose_and_agent_where_dstack_puts_them(guests: Guests) -> None:
    """/dstack/.host-shared/.user-config, /dstack/app-compose.json, /var/run/dstack.sock and their aliases."""
    script = (
        PROBE
        + """
print(json.dumps({
    'config': open('/dstack/.host-shared/.user-config').read(), 'alias': open('/dstack/user_config').read(),
    'compose': open('/dstack/app-compose.json').read(),
    'agents': [unix(p) for p in ('/var/run/dstack.sock', '/run/dstack.sock', '/var/run/dstack/dstack.sock')],
    'writable': [write(p + '/x') for p in ('/tmp', '/data', '/root', '/var/tmp', '/run', '/dev/shm')],
}))
"""
    )
    found = await guests.run(script, user_config='{"vm":"pv-1"}')
    assert found["config"] == found["alias"] == '{"vm":"pv-1"}'
    assert found["compose"] == guests.made[0].configuration.compose_file
    assert found["agents"] == ["connected"] * 3
    assert found["writable"] == ["written"] * 6


@pytest.mark.needs("root")
async def test_each_guest_has_a_uid_of_its_own_that_is_not_roots(guests: Guests) -> None:
    """As root, two guests run under two uids from 300000 on, and neither under 0."""
    one, other = guests.create(["sleep", "60"]), guests.create(["sleep", "60"])
    await until(lambda: one.boot_progress == other.boot_progress == "done", one)
    boxes = [machine.guest for machine in (one, other) if isinstance(machine.guest, Sandbox)]
    assert len(boxes) == 2
    uids = [Path(f"/proc/{box.pid}").stat().st_uid for box in boxes]
    assert len(set(uids)) == 2
    assert all(uid >= 300_000 for uid in uids)
    stages = [Path(f"/proc/{box.stage.pid}/status").read_text() for box in boxes]
    assert all("CapEff:\t0000000000000000" in status for status in stages)


async def test_foreign_calling_conventions_kill_and_io_uring_is_not_there(guests: Guests) -> None:
    """x32 numbers die with SIGSYS; io_uring, which could pass the filter by, answers ENOSYS."""
    found = await guests.run(
        PROBE
        + """
import signal
libc.syscall.restype = ctypes.c_long
pid = os.fork()
if pid == 0:
    libc.syscall(ctypes.c_long(0x40000000 + 39))
    os._exit(0)
_, status = os.waitpid(pid, 0)
libc.syscall(ctypes.c_long(425), 1, 0)
uring = errno.errorcode[ctypes.get_errno()]
print(json.dumps({'x32': os.waitstatus_to_exitcode(status), 'uring': uring}))
"""
    )
    assert found["uring"] == "ENOSYS"
    if os.uname().machine == "x86_64":
        assert found["x32"] == -31


async def test_the_host_reaches_the_guest_through_its_port_mapping(guests: Guests, free_port: int) -> None:
    """Bytes both ways, half-close kept, and the guest sees 10.0.2.2 as its peer."""
    machine = guests.create(
        """
import socket
with socket.create_server(('0.0.0.0', 10000)) as s:
    print('listening', flush=True)
    while True:
        c, peer = s.accept()
        data = b''
        while chunk := c.recv(65536):
            data += chunk
        c.sendall(peer[0].encode() + b' ' + str(len(data)).encode() + b' ' + data)
        c.close()
""",
        ports=[{"protocol": "tcp", "host_port": free_port, "vm_port": 10000}],
    )
    await until(lambda: machine.console.exists() and "listening" in machine.console.read_text(), machine)
    reader, writer = await asyncio.open_connection("127.0.0.1", free_port)
    body = os.urandom(3_000_000)
    writer.write(body)
    writer.write_eof()
    async with asyncio.timeout(20):
        answer = await reader.read(-1)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    assert answer == b"10.0.2.2 3000000 " + body
