"""Case 22: what uses up the machine, or does not end."""

from __future__ import annotations

from collections.abc import Callable

from tests.hostile.attack import ANY, FAILED, SUCCEEDED, Attack, Control, Facts

Won = Callable[[Facts], bool]

MIB = 1024 * 1024
_RUN_S = 5.0
_PROCESSES = 200
_TIMED_OUT = frozenset({"timeout"})
_ENDED = FAILED | _TIMED_OUT

_FORK = """
import os, time
for _ in range(2000):
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError:
        time.sleep(0.05)
time.sleep(60)
"""
_THREADS = """
import threading, time
threading.stack_size(65536)
for _ in range(2000):
    try:
        threading.Thread(target=time.sleep, args=(60,)).start()
    except RuntimeError:
        time.sleep(0.01)
"""
_HOG = """
import time
held = []
while True:
    held.append(bytearray(16 * 1024 * 1024))
    time.sleep(0.02)
"""
_HOGS = """
import os, time
for _ in range(12):
    if os.fork() == 0:
        held = bytearray(os.urandom(1024)) * (60 * 1024)
        time.sleep(60)
    time.sleep(0.25)
time.sleep(60)
"""
_FILLER = """
import time
for place in ("/workspace", "/tmp", "/dev/shm"):
    for number in range(64):
        try:
            with open(f"{place}/{number}", "wb") as file:
                for _ in range(8):
                    file.write(bytes(1024 * 1024))
        except OSError:
            break
time.sleep(2)
raise SystemExit(1)
"""
_SPARSE = """
import os, time
for place in ("/workspace", "/tmp", "/dev/shm"):
    with open(f"{place}/sparse", "wb") as file:
        try:
            os.ftruncate(file.fileno(), 1 << 40)
        except OSError as error:
            print(error)
time.sleep(3)
raise SystemExit(1)
"""
_SMALL = """
import os, time
made = 0
for number in range(1_000_000):
    try:
        os.close(os.open(f"/workspace/{number}", os.O_CREAT | os.O_WRONLY))
        made += 1
    except OSError:
        break
time.sleep(1)
raise SystemExit(1)
"""
_DEEP = """
import os, time
os.chdir("/tmp")
for number in range(200_000):
    try:
        os.mkdir("d")
        os.chdir("d")
    except OSError:
        break
time.sleep(1)
raise SystemExit(1)
"""
_SPIN = "while True: pass"
_DEAF = """
import signal
for number in range(1, signal.NSIG):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""
_DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        time.sleep(20)
    os._exit(0)
print("done")
"""
_TRACE = """
import ctypes, os, re
libc = ctypes.CDLL(None, use_errno=True)
for name in sorted(os.listdir("/proc")):
    if not name.isdigit() or int(name) == os.getpid():
        continue
    libc.ptrace(16, int(name), 0, 0)
    try:
        lines = open(f"/proc/{name}/maps").read().splitlines()
        memory = open(f"/proc/{name}/mem", "rb", 0)
    except OSError:
        continue
    for line in lines:
        area, flags, *_ = line.split()
        if not flags.startswith("rw"):
            continue
        start, end = (int(each, 16) for each in area.split("-"))
        try:
            memory.seek(start)
            data = memory.read(min(end - start, 64 * 1024 * 1024))
        except (OSError, OverflowError, ValueError):
            continue
        for found in set(re.findall(rb"canary[a-z]+[0-9a-f]{32}", data)):
            print(found.decode(), flush=True)
raise SystemExit(1)
"""
_FORK_IN_VM = """
import os, signal, time
children = []
for _ in range(700):
    try:
        child = os.fork()
    except OSError:
        time.sleep(0.005)
        continue
    if child == 0:
        signal.alarm(20)
        signal.pause()
        os._exit(0)
    children.append(child)
time.sleep(1)
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
_HOG_IN_VM = """
import os
child = os.fork()
if child == 0:
    held = [bytearray(16 * 1024 * 1024) for _ in range(120)]
    os._exit(0)
os.waitpid(child, 0)
"""


def _many(facts: Facts) -> bool:
    return facts.guest.processes > _PROCESSES


def _holds(mib: int) -> Won:
    return lambda facts: facts.guest.memory > mib * MIB


def _many_files(facts: Facts) -> bool:
    return facts.guest.inodes > 21_000


def _runs_on(facts: Facts) -> bool:
    return facts.guest.submission_s > 2 * _RUN_S


def _run(
    name: str, clause: str, program: str, control: Control, won: Won, outcomes: frozenset[str] = _ENDED
) -> Attack:
    """By a submission: what it uses is seen from outside."""
    return Attack(name, 22, clause, "submission", program, control, won, outcomes, watched=True)


def _vm(name: str, clause: str, program: str, control: Control, won: Won) -> Attack:
    """By a challenge, in its whole VM."""
    return Attack(name, 22, clause, "challenge", program, control, won, ANY, watched=True)


_OF_PROCESSES = Control(
    "processes of a run", "450 processes and threads to a run instead of 128; the VM still has 512"
)
_OF_MEMORY = Control(
    "memory of a run", "1 GiB to a run instead of 128 MiB; the VM's control group still has its own"
)
_OF_DISK = Control(
    "disk of a run", "700 MiB to a run instead of 32 MiB; the VM's control group still has its own"
)
_OF_FILES = Control("files of a run", "4,000,000 inodes instead of 20,000; the run's time still ends it")
_OF_TIME = Control("time of a run", "15 s to a run instead of 5; the job still has its own time")
_OF_KILLS = Control(
    "a kill that cannot be ignored", "SIGTERM at the end of its time; 8 s later the stage is killed"
)
_SPARSELY = Control("size of a file", "no RLIMIT_FSIZE; the tmpfs still holds 32 MiB")

RESOURCES = [
    _run("fork bomb", "fork-bomb", _FORK, _OF_PROCESSES, _many, _TIMED_OUT),
    _run("thread bomb", "thread-bomb", _THREADS, _OF_PROCESSES, _many, _TIMED_OUT),
    _run("memory hog", "memory-hog", _HOG, _OF_MEMORY, _holds(360)),
    _run("memory hog of many processes", "memory-hog", _HOGS, _OF_MEMORY, _holds(480)),
    _run("tmpfs filler", "tmpfs-filler", _FILLER, _OF_DISK, _holds(360), FAILED),
    _run(
        "1 TB sparse file",
        "sparse-file",
        _SPARSE,
        _SPARSELY,
        lambda facts: facts.guest.largest_file >= 1 << 40,
        FAILED,
    ),
    _run("10^6 small files", "small-files", _SMALL, _OF_FILES, _many_files),
    _run("deep directories", "deep-directories", _DEEP, _OF_FILES, _many_files),
    _run("CPU spin", "cpu-spin", _SPIN, _OF_TIME, _runs_on, _TIMED_OUT),
    _run("ignored SIGTERM", "ignored-sigterm", _DEAF, _OF_KILLS, _runs_on, _TIMED_OUT),
    Attack(
        "double fork and setsid",
        22,
        "double-fork",
        "submission",
        _DAEMON,
        Control(
            "the end of the whole tree",
            "no pid namespace of its own and nobody who reaps; each alone would end it; the VM still does",
        ),
        lambda facts: facts.number("left") > 0,
        outcomes=SUCCEEDED,
    ),
    Attack(
        "ptrace of the SDK",
        22,
        "ptrace",
        "submission",
        _TRACE,
        Control(
            "a sandbox of its own",
            "a plain child of the SDK, with no sandbox of its own; the VM is one still",
        ),
        lambda facts: bool(facts.found),
        outcomes=FAILED,
    ),
    _vm(
        "fork bomb of a challenge",
        "fork-bomb",
        _FORK_IN_VM,
        Control("processes of a VM", "900 processes to a VM instead of 512; they end after 20 s"),
        lambda facts: facts.guest.processes > 600,
    ),
    _vm(
        "memory hog of a challenge",
        "memory-hog",
        _HOG_IN_VM,
        Control(
            "memory of a VM", "1 GiB more to a VM than its 512 MiB and its disk; it takes 1.9 GiB at most"
        ),
        _holds(1650),
    ),
]
