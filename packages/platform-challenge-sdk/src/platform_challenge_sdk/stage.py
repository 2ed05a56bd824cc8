"""The helper process between the SDK and a contained run, one each.

Started as a program of its own (`python -I -S stage.py FD`): namespaces are entered by processes with one
thread. It makes the writable tmpfs and starts bubblewrap, or, where there are no namespaces, confines the
command itself by Landlock, seccomp and an own uid. It watches time, memory and disk, and is the reaper of
all that the run leaves behind; it ends when nothing of it is left. Told by JSON in FD, it answers with one
line of JSON on the control socket, and kills everything when that socket closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
import time
from pathlib import Path
from typing import Any

_NEWNS, _NEWUSER, _NEWNET = 0x20000, 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8914, 0x41
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SECCOMP_MODE_FILTER = 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _PATH_BENEATH = 444, 445, 446, 1
_RIGHTS_OF_A_FILE = 0b1100_0000_0000_0111  # the kernel refuses a folder's rights on a file
_INODES = 20_000
_TERMINALS = "newinstance,ptmxmode=0666,mode=0600,max=32"  # the kernel has 4096 for all, other jobs included
_FOR_NETWORK = ("fcntl", "socket")  # half of a stage's start, and most runs have no network
_DEPTH = 64
_DESCRIPTORS = 1 << 20
_RESERVE = 16 * 1024 * 1024  # of a disk without a cap of its own, this stays free
_SAMPLE = 0.05
_HELPER_MS = 3000
_NOT_FOUND, _SIGNALLED = 127, 128
_OF_THE_COMMAND = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENOEXEC, errno.ELOOP, errno.ENAMETOOLONG}
_OF_THE_COMMAND |= {errno.EISDIR, errno.E2BIG}
_SHARE = 20  # looking takes at most a twentieth of one core
_PAGE = resource.getpagesize()
_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """A step could not be done here; the message names it."""


class Stage:
    """One run. `config` is what `contained.py` decided."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._room = Path(config["room"])
        self._confined: dict[str, Any] | None = config.get("confined")
        self._apart = _NEWNET if config.get("relay") else 0
        for name in _FOR_NETWORK if self._apart else ():
            importlib.import_module(name)  # now: with root left behind it may be out of reach
        self._peak = 0

    def enter(self) -> None:
        """What is done before anything of the run exists."""
        _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
        if self._confined is None:
            self._enter_namespaces()
            return
        if _free(self._room) < self._config["disk"] + _RESERVE:
            raise Failed(f"expected {self._config['disk'] + _RESERVE} bytes free for the run's files")
        if self._confined["fence"] is None and self._confined["uid"] is None:
            raise Failed("expected a fence around signals: the run's end would be that of all with our uid")
        if self._confined["fence"] is not None:
            _restrict(bytes.fromhex(self._confined["fence"]), [])
            self._try_the_fence()

    def _try_the_fence(self) -> None:
        """Everyone whom we may signal is killed at the end: that must not be the SDK."""
        if self._confined is not None and self._confined["uid"] is None:
            with contextlib.suppress(PermissionError):
                os.kill(os.getppid(), 0)
                raise Failed("the fence around signals does not hold")

    def _enter_namespaces(self) -> None:
        """Leave root, if we are root, and enter a user and a mount namespace of our own with a tmpfs."""
        uid = os.geteuid()
        if uid == 0:
            # The kernel's own uid 0 passes many checks by its number alone, and no process limit binds it.
            uid = self._config["uid"]
            if _libc.unshare(_NEWNS) != 0:
                _enter_user_namespace_with(uid)
            self._furnish()
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            _checked(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "dumpable")
            _enter_user_namespace(self._apart)
        else:
            _enter_user_namespace(self._apart)
            self._furnish()
        disk = self._room / "disk"
        _mount("tmpfs", disk, "tmpfs", f"size={self._config['disk']},nr_inodes={_INODES},mode=755")
        for name in ("workspace", "tmp", "shm"):
            (disk / name).mkdir(mode=0o777)
        _call_mount("devpts", str(self._room / "pts"), "devpts", _NOSUID | _NOEXEC, _TERMINALS)

    def _furnish(self) -> None:
        _call_mount("none", "/", None, _REC | _PRIVATE, None)
        _mount("tmpfs", self._room, "tmpfs", "size=1m,mode=755")
        for name in ("disk", "pts"):
            (self._room / name).mkdir()
        for source, name in self._config["binds"]:
            (self._room / name).mkdir()
            _call_mount(source, str(self._room / name), None, _BIND | _REC, None)

    def open_the_way_out(self, control: int) -> None:
        """Give the SDK a socket that listens on the run's own loopback, all that its network has."""
        if self._config.get("relay") is None:
            return
        fcntl, socket = (sys.modules[name] for name in _FOR_NETWORK)
        with socket.socket() as listener, socket.socket(fileno=os.dup(control)) as told:
            fcntl.ioctl(listener, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP_RUNNING))
            listener.bind(tuple(self._config["relay"]))
            listener.listen()
            socket.send_fds(told, [b"+"], [listener.fileno()])

    def run(self, control: int) -> dict[str, Any]:
        """Run it to the end of everything that it started; the answer is the report."""
        status_read, status_write = os.pipe()
        os.set_inheritable(status_write, True)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            self._become(status_write)
        os.close(status_write)
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)  # the pipes close when the run has ended, not when we have
        killed_by, code = self._watch(child, control, began)
        wall = time.monotonic() - began
        self._reap_all()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        with os.fdopen(status_read, "rb") as file:
            told = file.read()
        if told.startswith(b"failed"):
            raise Failed(told.decode("utf-8", "replace"))
        ended = not told if self._confined is not None else b"exit-code" in told
        # Where small processes fill the kernel's memory it may kill bubblewrap, and the run ends with it.
        ended = ended or (code > _SIGNALLED and b"child-pid" in told)
        return {
            "code": code,
            "killed_by": killed_by,
            "started": ended or killed_by is not None,
            "missing": told == b"missing",
            "wall_ms": int(wall * 1000),
            "cpu_ms": int((used.ru_utime + used.ru_stime) * 1000),
            "peak": max(self._peak, used.ru_maxrss * 1024),
        }

    def _become(self, status: int) -> None:
        """In the child: bubblewrap, or the command itself. `status` says why it could not be started."""
        try:
            Path("/proc/self/oom_score_adj").write_bytes(b"1000")
            if self._confined is not None:
                self._become_confined(self._confined, status)
            # Bubblewrap asks for the same, but only once it has begun.
            _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent's death")
            self._limit(0)
            command = [self._config["bwrap"], "--json-status-fd", str(status)]
            for descriptor in self._config["inherit"]:
                os.set_inheritable(descriptor, True)
            os.execve(  # noqa: S606 - no shell is the point
                command[0], [*command, *self._config["arguments"]], {}
            )
        except BaseException as error:  # noqa: BLE001 - a forked child must never return
            os.write(2, f"bwrap: {error}".encode())
        finally:
            os._exit(1)

    def _become_confined(self, confined: dict[str, Any], status: int) -> None:
        command, environment = self._config["arguments"], confined["environment"]
        try:
            os.setsid()
            os.set_inheritable(status, False)
            with os.fdopen(confined["filter"], "rb") as file:
                program = file.read()
            os.chdir(confined["folder"])
            # Root counts for itself; an own uid counts from nothing; ours has its other processes already.
            self._limit(0 if confined["uid"] is not None else _threads_of(os.geteuid()))
            os.umask(0o022)
            if confined["uid"] is not None:
                _become_uid(confined["uid"])
            _restrict(bytes.fromhex(confined["ruleset"]), confined["paths"])
            _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent's death")
            os.closerange(3, status)
            os.closerange(status + 1, _DESCRIPTORS)
            _filter(program)
        except (Failed, OSError, ValueError) as error:
            os.write(status, f"failed: {error}".encode())
            os._exit(1)
        try:
            os.execvpe(command[0], command, environment)  # noqa: S606 - no shell is the point
        except OSError as error:
            if error.errno in _OF_THE_COMMAND:
                os.write(2, f"{command[0]}: {error.strerror}\n".encode())
                os.write(status, b"missing")
                os._exit(_NOT_FOUND)
            os.write(status, f"failed: {command[0]}: {error.strerror}".encode())
            os._exit(1)

    def _limit(self, processes: int) -> None:
        """Set the limits of each process; `processes` that are not the run's count with its own."""
        for name, value in self._config["rlimits"].items():
            limit = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(limit)[1]
            wanted = value + (processes if name == "NPROC" else 0)
            capped = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(limit, (capped, capped))

    def _watch(self, child: int, control: int, began: float) -> tuple[str | None, int]:
        """(killed_by, exit code as a shell has it) of the child."""
        pidfd = os.pidfd_open(child)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(control, select.POLLIN)
        deadline = began + self._config["timeout"]
        killed_by: str | None = None
        pause = _SAMPLE
        while True:
            wait = max(0.0, min(pause, deadline - time.monotonic()))
            ready = {descriptor for descriptor, _ in poll.poll(wait * 1000)}
            if pidfd in ready:
                break
            if control in ready:
                killed_by = "cancelled"
            elif time.monotonic() >= deadline:
                killed_by = "timeout"
            else:
                looked = time.thread_time()  # ours alone: on a busy machine it must not look less often
                # Twice: processes that end while the tree is read are counted askew once.
                if all(self._memory() > self._config["memory"] for _ in range(2)):
                    killed_by = "memory"
                elif self._confined is not None and self._overfull():
                    killed_by = "disk"
                pause = max(_SAMPLE, _SHARE * (time.thread_time() - looked))
            if killed_by is not None:
                self._kill_all() if self._confined is not None else os.kill(child, signal.SIGKILL)
                break
        _, status = os.waitpid(child, 0)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(status)
        return killed_by, code if code >= 0 else _SIGNALLED - code

    def _memory(self) -> int:
        """Bytes of the whole tree: anonymous and shared pages, counted once where the kernel tells (PSS)."""
        family = _family()
        total = sum(_resident(pid) for pid in family)
        if total > self._config["memory"]:
            total = self._proportionally(family)
        self._peak = max(self._peak, total)
        return total

    def _proportionally(self, family: list[int]) -> int:
        """The same, by what each process shares: under a uid of its own, only that uid is told."""
        uid = None if self._confined is None else self._confined["uid"]
        if uid is None:
            return sum(_proportional(pid) for pid in family)
        told, tell = os.pipe()
        helper = os.fork()
        if helper == 0:
            try:
                _become_uid(uid)
                os.write(tell, b"%d" % sum(_proportional(pid) for pid in family))
            finally:
                os._exit(0)
        os.close(tell)
        poll = select.poll()
        poll.register(told, select.POLLIN)
        total = os.read(told, 32) if poll.poll(_HELPER_MS) else b""
        os.close(told)
        os.kill(helper, signal.SIGKILL)  # an old Landlock lets the run stop it
        os.waitpid(helper, 0)
        return int(total) if total else sum(_proportional(pid) for pid in family)

    def _overfull(self) -> bool:
        """Whether its files are more than they may be, or too deep or hidden to be looked at."""
        if _free(self._room) < _RESERVE:
            return True
        used = found = 0
        folders = [(str(self._room / name), 0) for name in ("workspace", "tmp")]
        while folders:
            folder, depth = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        used += entry.stat(follow_symlinks=False).st_blocks * 512
                        found += 1
                        if entry.is_dir(follow_symlinks=False):
                            folders.append((entry.path, depth + 1))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError:
                return True
            if depth > _DEPTH or found > _INODES or used > self._config["disk"]:
                return True
        return False

    def _kill_all(self) -> None:
        """Kill everything of the run; where namespaces do not, in one call that no fork escapes."""
        if self._confined is None:
            for pid in _family():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        elif (uid := self._confined["uid"]) is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(-1, signal.SIGKILL)  # the fence lets it reach the run alone
        else:
            killer = os.fork()
            if killer == 0:
                try:
                    _become_uid(uid)
                    os.kill(-1, signal.SIGKILL)
                finally:
                    os._exit(0)
            os.waitpid(killer, 0)

    def _reap_all(self) -> None:
        """Kill and wait for everything that was left to us, until nothing is."""
        while True:
            self._kill_all()
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def _family() -> list[int]:
    """The pids of all our descendants."""
    parents: dict[int, int] = {}
    for pid in _numbered("/proc"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            found = Path("/proc", pid, "stat").read_bytes()
            parents[int(pid)] = int(found.rpartition(b")")[2].split()[1])
    ours = {os.getpid()}
    family: list[int] = []
    while more := [pid for pid, parent in parents.items() if parent in ours and pid not in ours]:
        ours.update(more)
        family += more
    return family


def _resident(pid: int) -> int:
    """Bytes of it that are in memory; 0 of a process that has ended."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc", str(pid), "statm").read_bytes().split()[1]) * _PAGE
    return 0


def _proportional(pid: int) -> int:
    """Bytes that are of no file outside, what is shared counted in part where the kernel tells it."""
    for name, keys in (("smaps_rollup", (b"Pss_Anon", b"Pss_Shmem")), ("status", (b"RssAnon", b"RssShmem"))):
        with contextlib.suppress(OSError, ValueError):
            lines = Path("/proc", str(pid), name).read_bytes().splitlines()
            words = [line.split() for line in lines if line.partition(b":")[0] in keys]
            if words:
                return sum(int(word[1]) for word in words) * 1024
    return 0


def _threads_of(uid: int) -> int:
    """How many threads of all processes here this uid has."""
    count = 0
    for pid in _numbered("/proc"):
        with contextlib.suppress(OSError):
            if Path("/proc", pid).stat().st_uid == uid:
                count += len(_numbered(f"/proc/{pid}/task"))
    return count


def _numbered(folder: str) -> list[str]:
    """The processes or threads that a folder of /proc lists."""
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.name.isdigit()]


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _become_uid(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _restrict(ruleset: bytes, paths: list[tuple[str, int]]) -> None:
    """Put ourselves behind a Landlock ruleset for good, with these (path, rights) let through."""
    rules = _libc.syscall(ctypes.c_long(_CREATE_RULESET), ruleset, ctypes.c_size_t(len(ruleset)), 0)
    _checked(min(rules, 0), "Landlock ruleset")
    for path, rights in paths:
        try:
            target = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        possible = rights if stat.S_ISDIR(os.fstat(target).st_mode) else rights & _RIGHTS_OF_A_FILE
        rule = struct.pack("=Qi", possible, target)
        _checked(_libc.syscall(ctypes.c_long(_ADD_RULE), rules, _PATH_BENEATH, rule, 0), f"Landlock {path}")
        os.close(target)
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    _checked(_libc.syscall(ctypes.c_long(_RESTRICT_SELF), rules, 0), "Landlock")
    os.close(rules)


def _filter(program: bytes) -> None:
    """Put ourselves under a system call filter for good."""
    array = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(array))
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0), "system call filter")


def _checked(result: int, step: str) -> None:
    if result != 0:
        raise Failed(f"{step}: {os.strerror(ctypes.get_errno())}")


def _unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "new user or mount namespace")


def _enter_user_namespace(apart: int) -> None:
    """As ourselves: bubblewrap cannot map our uid again if it is 0 outside (Linux 5.12)."""
    uid, gid = os.geteuid(), os.getegid()
    _unshare(_NEWUSER | _NEWNS | apart)
    # As bytes: with root left behind, Python may no longer reach its own library to import a codec.
    Path("/proc/self/setgroups").write_bytes(b"deny")
    Path("/proc/self/uid_map").write_bytes(b"%d %d 1" % (uid, uid))
    Path("/proc/self/gid_map").write_bytes(b"%d %d 1" % (gid, gid))


def _enter_user_namespace_with(uid: int) -> None:
    """As a container's root, who may not mount: one in which we are root still, and may become `uid`.

    More than its own ids only a process outside may map, which needs CAP_SETUID, CAP_SETGID and, for 0,
    CAP_SETFCAP (Linux 5.12): Docker leaves a container these.
    """
    entered, say = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(OSError):
            os.read(entered, 1)
            for kind in ("gid", "uid"):
                Path(f"/proc/{os.getppid()}/{kind}_map").write_bytes(b"0 0 1\n%d %d 1\n" % (uid, uid))
            code = 0
        os._exit(code)
    refused = _libc.unshare(_NEWUSER | _NEWNS)
    number = ctypes.get_errno()
    os.write(say, b"x")
    os.close(say)
    os.close(entered)
    _, status = os.waitpid(child, 0)
    if refused or status:
        raise Failed(
            f"new user or mount namespace: {os.strerror(number) if refused else 'no mapping of ids'}"
        )


def _mount(source: str, target: Path, kind: str, options: str) -> None:
    _call_mount(source, str(target), kind, _NOSUID | _NODEV, options)


def _call_mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    words = (None if word is None else os.fsencode(word) for word in (source, target, kind))
    data = None if options is None else options.encode()
    _checked(_libc.mount(*words, ctypes.c_ulong(flags), data), f"mount {target}")


def main() -> None:
    """Run one stage. The control socket is the descriptor that the configuration names."""
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        config = json.load(file)
    control = config["control"]
    os.set_inheritable(control, False)  # what runs must never speak for us
    try:
        stage = Stage(config)
        stage.enter()
        stage.open_the_way_out(control)
        report = stage.run(control)
    except (Failed, OSError, ValueError) as error:
        report = {"failed": str(error)}
    with contextlib.suppress(BrokenPipeError, ConnectionError):
        os.write(control, json.dumps(report).encode())


if __name__ == "__main__":
    main()
