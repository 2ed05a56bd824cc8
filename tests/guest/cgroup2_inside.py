"""PID 1 of a machine whose control groups are version 2 alone: the driver's groups against its real kernel.

As root, and as a user to whom a group was delegated as systemd does it; and what feeds a handler of core
dumps.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, "/probe")

from platform_vmm.sandbox.cgroups import ControlGroups, Limits

MIB = 1024 * 1024
ROOT = Path("/sys/fs/cgroup")
SERVICE = ROOT / "system.slice/vmm.service"
LEDGER = Path("/run/ledger/cgroups.json")
USER = 1000


def main() -> None:
    """Everything, and the machine's end."""
    found: dict[str, Any] = {}
    try:
        prepare()
        for name, uid in (("root", 0), ("user", USER)):
            found[name] = apart(partial(as_service, uid))
        found["core"] = {str(limit): handled(limit) for limit in (0, 1)}
    except BaseException:  # noqa: BLE001 - it must be seen, and PID 1 must not end before the machine
        found["error"] = traceback.format_exc()
    with Path("/dev/console").open("w") as console:
        console.write(f"\nresult: {json.dumps(found)}\n")
    os.sync()
    ctypes.CDLL(None).reboot(0x4321FEDC)


def prepare() -> None:
    """Mounts, and a service's group as systemd would make it."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, place in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run")):
        libc.mount(kind.encode(), place.encode(), kind.encode(), 0, None)
    if libc.mount(b"cgroup2", str(ROOT).encode(), b"cgroup2", 0, None):
        raise OSError(ctypes.get_errno(), "cgroup2")
    LEDGER.parent.mkdir(mode=0o777)
    LEDGER.parent.chmod(0o777)
    for group in (ROOT, SERVICE.parent):
        group.mkdir(exist_ok=True)
        (group / "cgroup.subtree_control").write_text("+memory +cpu +pids")


def apart(work: Callable[[], Any]) -> Any:
    """Do it in a process of its own; what it found."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            told = work()
        except BaseException:  # noqa: BLE001 - told, and the child ends
            told = traceback.format_exc()
        with os.fdopen(writing, "w") as pipe:
            json.dump(told, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def as_service(uid: int) -> dict[str, Any]:
    """Be the VMM's process: in the service's group, with this uid."""
    SERVICE.mkdir(exist_ok=True)
    for path in (SERVICE, *(SERVICE / f"cgroup.{name}" for name in ("procs", "threads", "subtree_control"))):
        os.chown(path, uid, uid)
    (SERVICE / "cgroup.procs").write_text(str(os.getpid()))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable, as a process that began with this uid is
    LEDGER.unlink(missing_ok=True)
    groups = ControlGroups("vmm-1", ledger=LEDGER)
    found: dict[str, Any] = {"limits_hold": groups.limits_hold, "own": own()}
    found["memory"] = outgrow(groups)
    found["pids"] = fork_much(groups)
    found["cpu"] = burn(groups)
    found["killed_ms"] = kill_all(groups)
    found["reclaimed"] = leave_and_reclaim(groups)
    groups.close()
    found["after"] = {"own": own(), "left": [path.name for path in SERVICE.iterdir() if path.is_dir()]}
    return found


def own() -> str:
    """The group that we are in."""
    return Path("/proc/self/cgroup").read_text().strip()


def inside(groups: ControlGroups, name: str, limits: Limits, work: Callable[[], int]) -> int:
    """Start work in a group, as the driver does: it waits until it is under the limits. Its pid."""
    groups.create(name, limits)
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(ready, 1)
        code = 99
        with contextlib.suppress(BaseException):
            code = work()
        os._exit(code)
    groups.attach(name, pid)
    os.write(go, b"x")
    os.close(ready)
    os.close(go)
    return pid


def ended(pid: int) -> int:
    """Its exit code; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outgrow(groups: ControlGroups) -> dict[str, Any]:
    """An SDK with a submission that wants too much: one dies, and the other lives to tell."""

    def work() -> int:
        child = os.fork()
        if child == 0:
            Path("/proc/self/oom_score_adj").write_text("1000")
            held = [bytearray(os.urandom(1)) * (8 * MIB) for _ in range(32)]
            os._exit(len(held))
        return 7 if ended(child) == -signal.SIGKILL else 8

    code = ended(inside(groups, "memory", Limits(64 * MIB, 1, 64), work))
    usage = groups.usage("memory")
    asyncio.run(groups.remove("memory"))
    return {"code": code, "oom_kills": usage["oom_kills"], "peak": usage.get("memory_peak_bytes", 0)}


def fork_much(groups: ControlGroups) -> int:
    """How many processes there were before fork failed."""

    def work() -> int:
        for made in range(200):
            try:
                if os.fork() == 0:
                    time.sleep(600)
            except OSError:
                return made
        return 200

    pid = inside(groups, "pids", Limits(256 * MIB, 1, 40), work)
    made = ended(pid)
    groups.kill("pids")
    asyncio.run(groups.remove("pids"))
    return made


def burn(groups: ControlGroups) -> dict[str, float]:
    """Two burners on two processors with the time of one."""

    def work() -> int:
        child = os.fork()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            pass
        if child:
            ended(child)
        return 0

    began = time.monotonic()
    ended(inside(groups, "cpu", Limits(256 * MIB, 1, 40), work))
    wall = time.monotonic() - began
    used = groups.usage("cpu")["cpu_time_ms"] / 1000
    stat = dict(line.split() for line in (SERVICE / "vmm-1/cpu/cpu.stat").read_text().splitlines())
    asyncio.run(groups.remove("cpu"))
    return {"share": used / wall, "throttled": int(stat["nr_throttled"])}


def kill_all(groups: ControlGroups) -> float:
    """Milliseconds until a tree that ignores signals and left its session is gone by cgroup.kill alone."""

    def work() -> int:
        for number in (1, 2, 15, 17):
            signal.signal(number, signal.SIG_IGN)
        for _ in range(20):
            if os.fork() == 0:
                os.setsid()
                time.sleep(600)
        time.sleep(600)
        return 0

    pid = inside(groups, "tree", Limits(256 * MIB, 1, 60), work)
    while len((SERVICE / "vmm-1/tree/cgroup.procs").read_text().split()) < 21:
        time.sleep(0.05)
    began = time.monotonic()
    groups.kill("tree")
    ended(pid)
    asyncio.run(groups.remove("tree"))
    return round((time.monotonic() - began) * 1000)


def leave_and_reclaim(groups: ControlGroups) -> list[str]:
    """What a VMM that died left is found by the next, which starts from the leaf."""

    def work() -> int:
        time.sleep(600)
        return 0

    pid = inside(groups, "left", Limits(64 * MIB, 1, 10), work)
    found = asyncio.run(ControlGroups("vmm-1", ledger=LEDGER).reclaim())
    ended(pid)
    return found


def handled(limit: int) -> bool:
    """Whether the kernel feeds a handler when a process with this RLIMIT_CORE crashes."""
    handler, trace = Path("/run/handler"), Path("/run/handled")
    handler.write_text(f"#!/usr/bin/busybox sh\n/usr/bin/busybox touch {trace}\n")
    handler.chmod(0o755)
    trace.unlink(missing_ok=True)
    Path("/proc/sys/kernel/core_pattern").write_text(f"|{handler}")
    pid = os.fork()
    if pid == 0:
        crash(limit)
    ended(pid)
    time.sleep(2)  # the kernel starts it when it likes; and of one that it does not start nothing ever comes
    return trace.exists()


def crash(limit: int) -> NoReturn:
    """Die of SIGSEGV."""
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)
    os._exit(1)


if __name__ == "__main__":
    main()
