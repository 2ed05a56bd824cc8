"""The helper process between the VMM and bubblewrap, one a sandbox. Run alone: `python -I -S stage.py FD`.

It owns the sandbox's user, network and first mount namespace, so that the guest, in a child user
namespace, has no capability over any of them. It makes sockets inside the network namespace for the
VMM and passes them over the control socket. When that socket closes, everything below it dies.

Standard library only, one thread, no import of ours: it runs before anything is dropped.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
SIOCSIFADDR, SIOCSIFFLAGS, SIOCSIFNETMASK = 0x8916, 0x8914, 0x891C
IP_BIND_ADDRESS_NO_PORT = 24
ROOM = "/mnt"  # covered by a tmpfs in our own mount namespace: nothing of it exists on the host
HOST, GUEST = "10.0.2.2", "10.0.2.15"
MAX_MESSAGE = 65536
NFT = b"""table inet sandbox { chain out { type filter hook output priority 0; policy drop;
oifname "lo" accept; counter reject with icmpx admin-prohibited
}
}
"""

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A libc call that must return 0."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount, as the system call does it."""
    encoded = [text.encode() if text is not None else None for text in (source, target, kind)]
    call("mount", *encoded, ctypes.c_ulong(flags), options.encode())


def bind(source: str, target: str) -> None:
    """A read-only bind mount of a file or folder."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, None, MS_BIND)
    mount("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def write(path: str, text: str) -> None:
    """Write a kernel file."""
    descriptor = os.open(path, os.O_WRONLY)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def prepare_mounts(config: dict[str, Any]) -> None:
    """As the VMM's own user: bring what the guest may read to a place that its uid can reach."""
    call("unshare", CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", ROOM, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source, name in config["binds"]:
        bind(source, f"{ROOM}/{name}")
    os.mkdir(f"{ROOM}/disk", 0o755)


def drop_to(uid: int) -> None:
    """Become the sandbox's own uid for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


def own_namespaces(config: dict[str, Any]) -> None:
    """User, network and mount namespaces, the guest's one disk, and the addresses on lo."""
    uid, gid = os.getuid(), os.getgid()
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    call("unshare", CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"0 {uid} 1")
    write("/proc/self/gid_map", f"0 {gid} 1")
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    if not config["root"]:
        mount("tmpfs", ROOM, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
        for source, name in config["binds"]:
            bind(source, f"{ROOM}/{name}")
        os.mkdir(f"{ROOM}/disk", 0o755)
    disk = f"size={config['disk_bytes']},nr_inodes={config['inodes']},mode=755"
    mount("tmpfs", f"{ROOM}/disk", "tmpfs", MS_NOSUID | MS_NODEV, disk)
    for name in ("tmp", "shm", "data", "run", "home", "vartmp"):
        os.mkdir(f"{ROOM}/disk/{name}", 0o755)
    for label, address in (("lo:0", GUEST), ("lo:1", HOST)):
        set_address(label, address)
    write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")


def set_address(label: str, address: str) -> None:
    """Bring lo up and give it one more /32."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", 0x49))
        for request, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.255")):
            packed = struct.pack("16sHH4s8x", label.encode(), socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, request, packed)


def packet_filter(program: str | None) -> bool:
    """A second wall: nothing leaves but over lo. The namespace has no other interface anyway."""
    if program is None:
        return False
    done = subprocess.run([program, "-f", "-"], input=NFT, capture_output=True, check=False, timeout=10)
    return done.returncode == 0


def listeners(ports: list[int]) -> list[socket.socket]:
    """Listening sockets inside the namespace, for the VMM to accept on."""
    found = []
    for port in ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(128)
        found.append(listener)
    return found


def spawn(config: dict[str, Any], log: int, go: int) -> int:
    """Fork the child that becomes bubblewrap once a byte arrives on `go`."""
    child = os.fork()
    if child:
        return child
    try:
        if os.read(go, 1) != b"g":
            os._exit(125)
        arguments = os.memfd_create("arguments", 0)
        os.write(arguments, b"".join(item.encode() + b"\0" for item in config["arguments"]))
        os.lseek(arguments, 0, os.SEEK_SET)
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(arguments, 3, inheritable=True)
        os.closerange(4, 1024)
        for name, value in config["rlimits"].items():
            limit = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(limit)[1]
            capped = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (capped, capped))
        os.execv(config["bwrap"], ["sandbox", "--args", "3", *config["command"]])  # noqa: S606 - no shell is the point
    except BaseException as error:  # noqa: BLE001 - a forked child must never return into the parent's code
        os.write(log, f"stage: {error}\n".encode())
    os._exit(126)


def serve(control: socket.socket, child: int) -> int:
    """Make sockets when asked, until the child ends or the VMM goes away. Returns the exit code."""
    watch = os.pidfd_open(child)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(watch, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == watch:
                return reap(child)
            message = control.recv(16)
            if message != b"S":
                os.kill(child, signal.SIGKILL)
                return reap(child)
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as fresh:
                fresh.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                fresh.bind((HOST, 0))
                socket.send_fds(control, [b'{"socket":1}'], [fresh.fileno()])


def reap(child: int) -> int:
    """Wait for the whole tree; the child's exit code as a shell would tell it."""
    code = 0
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else 128 - code


def main() -> None:
    """Build the sandbox in order; tell the VMM each thing that it waits for."""
    control = socket.socket(fileno=int(sys.argv[1]))
    message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE, 1)
    config = json.loads(message)
    log = descriptors[0]
    step = "mounts"
    try:
        if config["root"]:
            prepare_mounts(config)
            step = "uid"
            drop_to(config["uid"])
        step = "namespaces"
        own_namespaces(config)
        step = "packet filter"
        filtered = packet_filter(config["nft"])
        step = "listeners"
        inside = listeners(config["ports"])
        ready, go = os.pipe()
        child = spawn(config, log, ready)
        os.close(ready)
        os.close(log)
        told = json.dumps({"pid": child, "filtered": filtered}).encode()
        socket.send_fds(control, [told], [listener.fileno() for listener in inside])
        for listener in inside:
            listener.close()
        if control.recv(16) != b"go":
            os.close(go)
            os.kill(child, signal.SIGKILL)
            reap(child)
            return
        os.write(go, b"g")
        os.close(go)
        code = serve(control, child)
        control.send(json.dumps({"exit": code}).encode())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        try:
            control.send(json.dumps({"failed": f"{step}: {error}"}).encode())
        except OSError:
            os._exit(1)


if __name__ == "__main__":
    main()
