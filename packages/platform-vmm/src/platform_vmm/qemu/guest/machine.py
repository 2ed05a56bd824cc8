"""Takes the virtual machine from the kernel to a running service, and to its end.

The service runs in the same sandbox as it would on the host: the VMM sends the stage program and its
configuration, and this machine is what the VMM is there, the other end of the stage's control socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import socket
import struct
import sys
import threading
import time
import traceback
from types import CodeType
from typing import Any, NoReturn

from .exchange import BROKER, Exchange
from .port import Port, PortClosed

ADDRESS = "10.0.2.15"
SHARED = "/run/shared"
GROUPS = "/run/cgroup"
GROUP = f"{GROUPS}/service"
PROBE = "platform.probe"
"""On the kernel's command line: only show that user space runs."""
ALIVE = "platform-guest: user space runs"
_RESERVE = 48 * 1024 * 1024
"""Bytes of memory that the service never gets, for the kernel and us."""
_CONSOLE_BYTES = 2 * 1024 * 1024
_USAGE_S = 2.0
_LAST_WORDS_S = 10.0
_SIOCSIFADDR, _SIOCSIFFLAGS, _SIOCSIFNETMASK = 0x8916, 0x8914, 0x891C
_UP, _POWER_OFF = 0x1, 0x4321FEDC
_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_SETTINGS = {
    "kernel/dmesg_restrict": "1",
    "kernel/kptr_restrict": "2",
    "kernel/modules_disabled": "1",
    "kernel/unprivileged_userns_clone": "1",
    "net/ipv4/ip_forward": "0",
    "net/ipv6/conf/all/disable_ipv6": "1",
}
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """The whole life of the machine."""
    port: Port | None = None
    try:
        prepare()
        with open("/proc/cmdline") as file:
            if PROBE in file.read().split():
                say(ALIVE)
                power_off()
        port = Port(wait_for("/dev/vport*p1"))
        port.send(hello=1)
        code = Service(port, port.receive()).run()
        port.send(exit=code)
    except (OSError, ValueError, KeyError, PortClosed) as error:
        say(traceback.format_exc())
        if port is not None:
            port.send(failed=f"{type(error).__name__}: {error}"[:1024])
    finally:
        power_off()


def prepare() -> None:
    """Mounts, the network and the kernel's settings."""
    for kind, place, flags, options in (
        ("proc", "/proc", _NOSUID | _NODEV | _NOEXEC, ""),
        ("devtmpfs", "/dev", _NOSUID | _NOEXEC, ""),
        ("tmpfs", "/run", _NOSUID | _NODEV, "size=32m,mode=755"),
    ):
        mount(kind, place, kind, flags, options)
    os.makedirs("/mnt", exist_ok=True)  # the stage's room
    os.makedirs(GROUPS)
    mount("cgroup2", GROUPS, "cgroup2", _NOSUID | _NODEV | _NOEXEC)
    for name, value in _SETTINGS.items():
        try:
            write(f"/proc/sys/{name}", value)
        except FileNotFoundError:
            continue  # not every kernel has each of them
    socket.sethostname("vm")
    set_address("lo", "127.0.0.1", "255.0.0.0")
    if os.path.exists("/proc/sys/net/ipv4/conf/eth0"):
        set_address("eth0", ADDRESS, "255.255.255.0")


class Service:
    """The one service of this machine, in its sandbox. `config` is the VMM's first message."""

    def __init__(self, port: Port, config: dict[str, Any]) -> None:
        self._port = port
        self._config = config
        self._control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stage = 0
        self._console = threading.Thread(target=show, daemon=True)

    def run(self) -> int:
        """Run it to its end.

        Returns:
            Its exit code, as a shell would tell it.
        """
        stage = self._config["stage"]
        for program in ("nft", "bwrap"):
            stage[program] = found(program)
        agent = self._furnish(stage["uid"])
        self._spawn(stage)
        told, descriptors, _, _ = socket.recv_fds(self._control, 65_536, 64)
        answer = json.loads(told or b'{"failed": "the stage died"}')
        if "failed" in answer:
            raise OSError(answer["failed"])
        self._limit(answer["pid"], stage)
        exchange = Exchange(self._port, os.open(f"/proc/{self._stage}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        exchange.offer(agent, "agent")
        for descriptor, number in zip(descriptors, stage["ports"], strict=True):
            exchange.offer(socket.socket(fileno=descriptor), str(number))
        exchange.serve(socket.create_server((ADDRESS, BROKER), backlog=128))
        threading.Thread(target=self._obey, args=(exchange,), daemon=True).start()
        self._control.send(b"go")
        self._port.send(up=True, walled=answer["walled"])
        threading.Thread(target=self._tell_usage, daemon=True).start()
        last = self._control.recv(65_536)
        self._console.join(_LAST_WORDS_S)
        return int(json.loads(last).get("exit", 1)) if last else 1

    def _furnish(self, uid: int) -> socket.socket:
        """What the service finds under /dstack/.host-shared, and the agent's socket."""
        os.mkdir(SHARED, 0o755)
        for name, text in self._config["files"].items():
            descriptor = os.open(f"{SHARED}/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o400)
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            os.chown(f"{SHARED}/{name}", uid, uid)
        agent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        agent.bind(f"{SHARED}/dstack.sock")
        os.chmod(f"{SHARED}/dstack.sock", 0o666)
        agent.listen(16)
        return agent

    def _spawn(self, config: dict[str, Any]) -> None:
        """Start the stage as a fork of ours: an interpreter's start is dear on an emulated processor."""
        program = compile(self._config["program"], "stage.py", "exec")
        document = os.memfd_create("config")
        os.write(document, json.dumps(config).encode())
        os.lseek(document, 0, os.SEEK_SET)
        reading, writing = os.pipe()
        self._stage = os.fork()
        if self._stage == 0:
            self._become_stage(program, writing)
        self._theirs.close()
        socket.send_fds(self._control, [b"config"], [document, writing])
        os.close(document)
        os.close(writing)
        self._console = threading.Thread(target=show, args=(reading,), daemon=True)
        self._console.start()

    def _become_stage(self, program: CodeType, console: int) -> NoReturn:
        try:
            theirs = os.dup(self._theirs.fileno())
            null = os.open("/dev/null", os.O_RDWR)
            for target, source in enumerate((null, console, console)):
                os.dup2(source, target)
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2 and int(name) != theirs:  # noqa: PLR2004 - the standard ones
                    with contextlib.suppress(OSError):
                        os.close(int(name))
            sys.argv = ["stage", str(theirs)]
            stage: dict[str, Any] = {"__name__": "stage"}
            exec(program, stage)  # noqa: S102 - the VMM's own program, as it sent it
            stage["main"]()
        except BaseException:  # noqa: BLE001 - a fork must never return into the parent's code
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(0)

    def _limit(self, pid: int, config: dict[str, Any]) -> None:
        """Put the service in a control group that leaves the kernel and us some room."""
        write(f"{GROUPS}/cgroup.subtree_control", "+memory +pids")
        os.mkdir(GROUP)
        write(f"{GROUP}/memory.max", str(max(memory_total() - _RESERVE, _RESERVE)))
        write(f"{GROUP}/pids.max", str(config["rlimits"]["NPROC"]))
        write(f"{GROUP}/cgroup.procs", str(pid))

    def _obey(self, exchange: Exchange) -> None:
        """Do what the VMM says until it is gone; then there is nobody to run for."""
        try:
            while True:
                message = self._port.receive()
                if "refused" in message:
                    exchange.refuse(message["refused"])
                elif "terminate" in message:
                    self._control.send(b"T")
        except (OSError, ValueError, PortClosed):
            power_off()

    def _tell_usage(self) -> None:
        while True:
            disk = os.statvfs(f"/proc/{self._stage}/root/mnt/disk")
            with open(f"{GROUP}/memory.current") as current, open(f"{GROUP}/memory.peak") as peak:
                self._port.send(
                    usage={
                        "memory_bytes": int(current.read()),
                        "memory_peak_bytes": int(peak.read()),
                        "disk_total_bytes": disk.f_blocks * disk.f_frsize,
                        "disk_free_bytes": disk.f_bfree * disk.f_frsize,
                    }
                )
            time.sleep(_USAGE_S)


def show(reading: int) -> None:
    """Copy what the service writes to the console; beyond a bound it is dropped, and the service goes on."""
    console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
    room = _CONSOLE_BYTES
    while chunk := os.read(reading, 65_536):
        data = chunk[:room]
        room -= len(data)
        while data:
            data = data[os.write(console, data) :]


def say(text: str) -> None:
    """One line on the console."""
    with open("/dev/console", "w") as console:
        console.write(f"{text}\n")


def power_off() -> NoReturn:
    """End the machine."""
    os.sync()
    _libc.reboot(_POWER_OFF)
    os._exit(0)


def wait_for(pattern: str) -> str:
    """The path of a device, once the kernel has made it."""
    for _ in range(200):
        if paths := glob.glob(pattern):
            return paths[0]
        time.sleep(0.05)
    raise FileNotFoundError(f"no {pattern}: the VMM's control port is not there")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount, as the system call does it."""
    words = (source.encode(), target.encode(), kind.encode())
    if _libc.mount(*words, ctypes.c_ulong(flags), options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {target}: {os.strerror(number)}")


def set_address(name: str, address: str, netmask: str) -> None:
    """Give an interface its address and bring it up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, netmask)):
            packed = struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, request, packed)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", name.encode(), _UP))


def memory_total() -> int:
    """Bytes of the machine's memory."""
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) * 1024


def found(program: str) -> str | None:
    """Where a program is in this image; None when it is not."""
    paths = (f"{folder}/{program}" for folder in ("/usr/bin", "/usr/sbin"))
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def write(path: str, text: str) -> None:
    """Write a kernel file."""
    with open(path, "w") as file:
        file.write(text)
