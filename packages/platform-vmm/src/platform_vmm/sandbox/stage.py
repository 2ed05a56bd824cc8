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
import stat
import struct
import subprocess
import sys
from typing import Any

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
SIOCSIFADDR, SIOCSIFFLAGS, SIOCSIFNETMASK = 0x8916, 0x8914, 0x891C
IP_BIND_ADDRESS_NO_PORT = 24
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH, OPEN_TREE_CLONE, MOVE_EMPTY_PATH = -100, 0x1000, 1, 4
ANYBODY = 0o005  # may read and enter
MOUNT_ATTR_RDONLY, MOUNT_ATTR_IDMAP = 1, 0x100000
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64")
ETC = ("ld.so.cache", "alternatives", "passwd", "group", "hosts", "nsswitch.conf")
ROOM = "/mnt"  # covered by a tmpfs in our own mount namespace: nothing of it exists on the host
HOST, GUEST = "10.0.2.2", "10.0.2.15"
SIGNALLED = 128
LOW_DESCRIPTORS = 64
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


def furnish(config: dict[str, Any]) -> None:
    """The room: what the guest may read, its devices, and where its disk will be."""
    mount("tmpfs", ROOM, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source, name in config["binds"]:
        bind(source, f"{ROOM}/{name}")
    os.mkdir(f"{ROOM}/disk", 0o755)
    os.close(os.open(f"{ROOM}/nothing", os.O_CREAT, 0))
    for kind in ("lower", "system") if config["writable"] else ():
        for name in config["writable"].values():
            os.makedirs(f"{ROOM}/{kind}/{name}", exist_ok=True)
    if not config["devices"]:
        return
    os.mkdir(f"{ROOM}/devices", 0o755)
    if config["root"]:  # a node of its own, since the host's belongs to others
        mount("tmpfs", f"{ROOM}/devices", "tmpfs", MS_NOSUID | MS_NOEXEC, "size=64k,mode=755")
    for source in config["devices"]:
        target = f"{ROOM}/devices/{os.path.basename(source)}"
        if config["root"]:
            os.mknod(target, stat.S_IFCHR | 0o600, os.stat(source).st_rdev)
            os.chown(target, config["uid"], config["uid"])
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
            mount(source, target, None, MS_BIND)


def write(path: str, text: str) -> None:
    """Write a kernel file."""
    descriptor = os.open(path, os.O_WRONLY)
    os.write(descriptor, text.encode())
    os.close(descriptor)


def prepare_mounts(config: dict[str, Any]) -> None:
    """As the VMM's own user: bring what the guest may read to a place that its uid can reach."""
    call("unshare", CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    furnish(config)
    if config["writable"]:
        owner = mapping(config["uid"])
        given_to(owner, f"{ROOM}/image", f"{ROOM}/lower/image")
        os.close(owner)


def mapping(uid: int) -> int:
    """A user namespace, by its descriptor, in which root is this uid outside."""
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        end_with_parent()
        os.write(begun, b"x" if libc.unshare(CLONE_NEWUSER) == 0 else b"-")
        signal.pause()
        os._exit(0)
    try:
        if os.read(ready, 1) != b"x":
            raise OSError("a user namespace to map owners with")
        for kind in ("uid", "gid"):
            write(f"/proc/{child}/{kind}_map", f"0 {uid} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(begun)


def given_to(owner: int, source: str, target: str) -> None:
    """A read-only bind mount in which what is root's belongs to the guest: a layer over it can change it.

    For the image alone: in the system's folders it would open to the guest what only root may read. Where
    the file system cannot do that the owners stay.
    """
    tree = libc.syscall(OPEN_TREE, AT_FDCWD, source.encode(), OPEN_TREE_CLONE | os.O_CLOEXEC)
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY, 0, 0, owner)
    try:
        done = tree >= 0 and libc.syscall(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, 32) == 0
        if done and libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, target.encode(), MOVE_EMPTY_PATH) == 0:
            return
    finally:
        if tree >= 0:
            os.close(tree)
    mount(source, target, None, MS_BIND)


def writable_root(config: dict[str, Any]) -> None:
    """A root on the guest's disk, with layers on it over the system's folders, and files of its own."""
    disk = f"{ROOM}/disk"
    os.mkdir(f"{disk}/rootfs", 0o755)
    for source, name in config["writable"].items():
        for part in ("upper", "layer"):
            os.makedirs(f"{disk}/{part}/{name}", 0o755)
        lower = f"{ROOM}/lower/{name}" if config["root"] and name == "image" else source
        if name != "image":
            give_folders(source, f"{disk}/upper/{name}", deeper=("local",))
        layers = f"lowerdir={lower},upperdir={disk}/upper/{name},workdir={disk}/layer/{name},userxattr"
        mount("overlay", f"{ROOM}/system/{name}", "overlay", MS_NOSUID | MS_NODEV, layers)
    for source, place in config["copies"].items():
        os.makedirs(f"{disk}/rootfs{os.path.dirname(place)}", exist_ok=True)
        if os.path.exists(source):
            copy(source, f"{disk}/rootfs{place}")


def give_folders(source: str, upper: str, deeper: tuple[str, ...]) -> None:
    """A layer's folders over those of the system, the guest's own: entries there can be made and removed.

    Only over what everybody may read; the files below keep their owner and mode.
    """
    for entry in os.scandir(source):
        if entry.is_dir(follow_symlinks=False) and entry.stat().st_mode & ANYBODY == ANYBODY:
            os.mkdir(f"{upper}/{entry.name}", 0o755)
            if entry.name in deeper:
                give_folders(entry.path, f"{upper}/{entry.name}", ())


def copy(source: str, target: str) -> None:
    """A file, a link or a folder with all that is in it. By now this process cannot import what does it."""
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
    elif os.path.isdir(source):
        os.mkdir(target, 0o755)
        for name in os.listdir(source):
            copy(f"{source}/{name}", f"{target}/{name}")
    else:
        with open(source, "rb") as old, open(target, "xb") as new:
            new.write(old.read())


def covers(denied: list[str]) -> list[str]:
    """Bubblewrap's arguments that put nothing over each path, or over what it leads to in the system."""
    words: list[str] = []
    covered: list[str] = []
    for path in denied:
        real, folder = path, True
        if path.split("/")[1] in SYSTEM:
            real = os.path.realpath(path)
            if real.split("/")[1] not in SYSTEM or not os.path.exists(real):
                continue  # nothing that a guest has
            folder = os.path.isdir(real)
        elif path.startswith("/etc/"):
            own = f"{ROOM}/image{path}"
            source = own if os.path.exists(own) else path
            if path.split("/")[2] not in ETC or not os.path.exists(source):
                continue
            folder = os.path.isdir(source)
        if any(f"{real}/".startswith(f"{one}/") for one in covered):
            continue  # there is no such place any more
        covered.append(real)
        if folder:
            words += ["--perms", "0000", "--tmpfs", real, "--remount-ro", real]
        else:
            words += ["--ro-bind", f"{ROOM}/nothing", real]
    return words


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
        furnish(config)
    for name, most in config["namespaces"].items():
        write(f"/proc/sys/user/max_{name}_namespaces", str(most))
    disk = f"size={config['disk_bytes']},nr_inodes={config['inodes']},mode=755"
    mount("tmpfs", f"{ROOM}/disk", "tmpfs", MS_NOSUID | MS_NODEV, disk)
    for name in config["folders"]:
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


def spawn(config: dict[str, Any], log: int, go: int, other: int) -> int:
    """Fork the child that becomes bubblewrap once a byte arrives on `go`, or ends when `other` closes."""
    child = os.fork()
    if child:
        return child
    try:
        os.close(other)
        end_with_parent()  # bubblewrap asks for the same, but only once it has begun
        if os.read(go, 1) != b"g":
            os._exit(125)
        write("/proc/self/oom_score_adj", str(config["oom_score"]))
        arguments = [*config["arguments"], *covers(config["denied"]), *config["closing"]]
        words = b"".join(item.encode() + b"\0" for item in arguments)
        inherited = [os.open("/dev/null", os.O_RDONLY), log, log]
        inherited += [memory_file("arguments", words), memory_file("filter", bytes.fromhex(config["filter"]))]
        high = [fcntl.fcntl(one, fcntl.F_DUPFD, LOW_DESCRIPTORS) for one in inherited]
        os.closerange(0, LOW_DESCRIPTORS)
        for target, one in enumerate(high):
            os.dup2(one, target, inheritable=True)
        os.closerange(len(high), 2 * LOW_DESCRIPTORS)
        for name, value in config["rlimits"].items():
            limit = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(limit)[1]
            capped = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(limit, (capped, capped))
        os.execv(config["bwrap"], ["sandbox", "--args", "3", *config["command"]])  # noqa: S606 - no shell is the point
    except BaseException as error:  # noqa: BLE001 - a forked child must never return into the parent's code
        os.write(log, f"stage: {error}\n".encode())
    os._exit(126)


def end_with_parent() -> None:
    """In a child: SIGKILL as soon as this stage is gone, however it went."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def memory_file(name: str, data: bytes) -> int:
    """A descriptor to read `data` from."""
    descriptor = os.memfd_create(name, 0)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def give_up_privileges() -> None:
    """All is built: no capability in the sandbox's namespaces any more, nothing to trace, few files."""
    header = struct.pack("=Ii", 0x20080522, 0)
    call("capset", header, bytes(24))
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, LOW_DESCRIPTORS)):
        resource.setrlimit(limit, (value, value))


def terminate(child: int) -> None:
    """SIGTERM to the guest's first process: the one below bubblewrap's pid 1 below bubblewrap."""
    pid = child
    for _ in range(2):
        below = children(pid)
        if not below:
            return
        pid = below[0]
    os.kill(pid, signal.SIGTERM)


def children(pid: int) -> list[int]:
    """The processes whose parent this one is."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and parent(name) == pid]


def parent(name: str) -> int:
    """Of a process, by its folder in /proc; 0 when it is gone."""
    try:
        with open(f"/proc/{name}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


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
            if message == b"T":
                try:
                    terminate(child)
                except OSError:
                    return reap(child)
                continue
            if message != b"S":
                return reap(child)
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as fresh:
                fresh.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                fresh.bind((HOST, 0))
                socket.send_fds(control, [b'{"socket":1}'], [fresh.fileno()])


def reap(child: int) -> int:
    """Kill and reap the whole tree; the child's exit code as a shell would tell it.

    Again and again: bubblewrap's pid 1, killed on while it starts, may outlive its parent and become ours.
    """
    code = 0
    while True:
        for pid in children(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            code = code if code >= 0 else SIGNALLED - code


def main() -> None:
    """Build the sandbox in order; tell the VMM each thing that it waits for."""
    control = socket.socket(fileno=fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD_CLOEXEC, 3))
    os.close(int(sys.argv[1]))
    _, descriptors, _, _ = socket.recv_fds(control, 16, 2)
    if len(descriptors) != 2:  # noqa: PLR2004 - the configuration and the log
        return
    with os.fdopen(descriptors[0], "rb") as file:
        config = json.loads(file.read())
    log = descriptors[1]
    step = "mounts"
    try:
        if config["root"]:
            prepare_mounts(config)
            step = "uid"
            drop_to(config["uid"])
        step = "namespaces"
        own_namespaces(config)
        if config["writable"]:
            step = "a writable root (read_only = false needs overlayfs in user namespaces: Linux 5.11)"
            writable_root(config)
        step = "packet filter"
        walled = packet_filter(config["nft"])
        step = "listeners"
        inside = listeners(config["ports"])
        ready, go = os.pipe()
        child = spawn(config, log, ready, go)
        os.close(ready)
        os.close(log)
        step = "privileges"
        give_up_privileges()
        told = json.dumps({"pid": child, "walled": walled}).encode()
        socket.send_fds(control, [told], [listener.fileno() for listener in inside])
        for listener in inside:
            listener.close()
        if control.recv(16) != b"go":
            os.close(go)
            reap(child)
            return
        os.write(go, b"g")
        os.close(go)
        code = serve(control, child)
        control.send(json.dumps({"exit": code}).encode())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reap(0)
        try:
            control.send(json.dumps({"failed": f"{step}: {error}"}).encode())
        except OSError:
            os._exit(1)


if __name__ == "__main__":
    main()
