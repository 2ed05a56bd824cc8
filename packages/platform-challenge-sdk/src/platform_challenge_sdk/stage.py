"""The helper process between the SDK and bubblewrap, one a contained run.

Started as a program of its own (`python -I -S stage.py FD`): namespaces are entered by processes with one
thread. It makes the writable tmpfs, starts bubblewrap, watches time and memory, and is the reaper of all
that the run leaves behind; it ends when nothing of it is left. Told by JSON in FD, it answers with one line
of JSON on the control socket, and kills everything when that socket closes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

_NEWNS, _NEWUSER = 0x20000, 0x10000000
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
_INODES = 20_000
_SAMPLE = 0.05
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
        self._peak = 0

    def enter(self) -> None:
        """Leave root, if we are root, and enter a user and a mount namespace of our own with a tmpfs."""
        _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
        uid = os.geteuid()
        if uid == 0:
            # The kernel's own uid 0 passes many checks by its number alone, and no process limit binds it.
            _unshare(_NEWNS)
            self._furnish()
            uid = self._config["uid"]
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            _checked(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "dumpable")
            _enter_user_namespace()
        else:
            _enter_user_namespace()
            self._furnish()
        disk = self._room / "disk"
        _mount("tmpfs", disk, "tmpfs", f"size={self._config['disk']},nr_inodes={_INODES},mode=755")
        for name in ("workspace", "tmp", "shm"):
            (disk / name).mkdir(mode=0o777)

    def _furnish(self) -> None:
        _call_mount("none", "/", None, _REC | _PRIVATE, None)
        _mount("tmpfs", self._room, "tmpfs", "size=1m,mode=755")
        (self._room / "disk").mkdir()
        for source, name in self._config["binds"]:
            (self._room / name).mkdir()
            _call_mount(source, str(self._room / name), None, _BIND | _REC, None)

    def run(self, control: int) -> dict[str, Any]:
        """Run bubblewrap to the end of everything that it started; the answer is the report."""
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
        _reap_all()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        with os.fdopen(status_read, "rb") as told:
            started = b"exit-code" in told.read() or killed_by is not None
        return {
            "code": code,
            "killed_by": killed_by,
            "started": started,
            "wall_ms": int(wall * 1000),
            "cpu_ms": int((used.ru_utime + used.ru_stime) * 1000),
            "peak": max(self._peak, used.ru_maxrss * 1024),
        }

    def _become(self, status: int) -> None:
        try:
            Path("/proc/self/oom_score_adj").write_bytes(b"1000")
            for name, value in self._config["rlimits"].items():
                limit = getattr(resource, f"RLIMIT_{name}")
                hard = resource.getrlimit(limit)[1]
                capped = value if hard == resource.RLIM_INFINITY else min(value, hard)
                resource.setrlimit(limit, (capped, capped))
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

    def _watch(self, child: int, control: int, began: float) -> tuple[str | None, int]:
        """(killed_by, exit code as a shell has it) of bubblewrap."""
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
                looked = time.monotonic()
                # Twice: processes that end while the tree is read are counted askew once.
                if all(self._memory() > self._config["memory"] for _ in range(2)):
                    killed_by = "memory"
                pause = max(_SAMPLE, _SHARE * (time.monotonic() - looked))
            if killed_by is not None:
                os.kill(child, signal.SIGKILL)
                break
        _, status = os.waitpid(child, 0)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(status)
        return killed_by, code if code >= 0 else 128 - code

    def _memory(self) -> int:
        """Bytes of the whole tree: private pages, counted once where the kernel tells (PSS)."""
        family = _family()
        simple = sum(pages for _, pages in family) * _PAGE
        total = simple
        if simple > self._config["memory"]:
            total = sum(_proportional(pid, pages * _PAGE) for pid, pages in family)
        self._peak = max(self._peak, total)
        return total


def _family() -> list[tuple[int, int]]:
    """(pid, private pages) of all our descendants."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - names only, often
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path("/proc", name, "stat").read_bytes()
                parents[int(name)] = int(stat.rpartition(b")")[2].split()[1])
    ours = {os.getpid()}
    found: list[int] = []
    while more := [pid for pid, parent in parents.items() if parent in ours and pid not in ours]:
        ours.update(more)
        found += more
    return [(pid, _private(pid)) for pid in found]


def _private(pid: int) -> int:
    """Private pages; 0 of a process that has ended."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc", str(pid), "statm").read_bytes().split()
        return int(fields[1]) - int(fields[2])
    return 0


def _proportional(pid: int, private: int) -> int:
    """Bytes that a process has of its own or shares in part, at most ``private``."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc", str(pid), "smaps_rollup").read_bytes().splitlines():
            if line.startswith(b"Pss_Anon:"):
                return min(int(line.split()[1]) * 1024, private)
    # Not told: it has ended meanwhile, or hides from us and is counted in full.
    return _private(pid) * _PAGE


def _reap_all() -> None:
    """Kill and wait for everything that was left to us, until nothing is."""
    while True:
        for pid, _ in _family():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _checked(result: int, step: str) -> None:
    if result != 0:
        raise Failed(f"{step}: {os.strerror(ctypes.get_errno())}")


def _unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "new user or mount namespace")


def _enter_user_namespace() -> None:
    """As ourselves: bubblewrap cannot map our uid again if it is 0 outside (Linux 5.12)."""
    uid, gid = os.geteuid(), os.getegid()
    _unshare(_NEWUSER | _NEWNS)
    # As bytes: with root left behind, Python may no longer reach its own library to import a codec.
    Path("/proc/self/setgroups").write_bytes(b"deny")
    Path("/proc/self/uid_map").write_bytes(b"%d %d 1" % (uid, uid))
    Path("/proc/self/gid_map").write_bytes(b"%d %d 1" % (gid, gid))


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
        report = stage.run(control)
    except (Failed, OSError, ValueError) as error:
        report = {"failed": str(error)}
    with contextlib.suppress(BrokenPipeError, ConnectionError):
        os.write(control, json.dumps(report).encode())


if __name__ == "__main__":
    main()
