"""What a guest could use against its host, tried from inside; and every way its tree is killed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from guests import Guests, until
from running_vmm import UID, Bench

from platform_vmm.sandbox import cgroups, driver

READS = """
import errno, glob, json, os
def read(path, size=100_000):
    try:
        with open(path, 'rb') as file: return file.read(size).decode('latin1')
    except OSError as error: return errno.errorcode.get(error.errno, str(error))
def opens(path, flags):
    try:
        os.close(os.open(path, flags))
        return 'opened'
    except OSError as error: return errno.errorcode.get(error.errno, str(error))
"""


async def test_proc_tells_a_guest_no_address_key_timer_or_log_of_the_kernel(guests: Guests) -> None:
    """They are there, since a covered /proc could not be mounted again for a submission, and say nothing."""
    found = await guests.run(
        READS
        + """
symbols = [line.split()[0] for line in read('/proc/kallsyms').splitlines()]
modules = [line.split()[-1] for line in read('/proc/modules').splitlines() if '0x' in line]
print(json.dumps({
    'symbols': sorted({int(one, 16) for one in symbols if one.strip('0123456789abcdef') == ''}),
    'modules': sorted({int(one, 16) for one in modules}), 'keys': read('/proc/keys'),
    'closed': {path: read(path, 64) for path in (
        '/proc/timer_list', '/proc/kcore', '/proc/kmsg', '/proc/slabinfo', '/proc/kpagecount',
        '/proc/kpageflags', '/proc/vmallocinfo', '/proc/pagetypeinfo', '/proc/sched_debug',
        '/proc/sysrq-trigger', '/dev/mem', '/dev/kmsg', '/sys/kernel/debug')},
    'pids': [name for name in os.listdir('/proc') if name.isdigit()],
}))
"""
    )
    assert found["symbols"] in ([], [0])
    assert found["modules"] in ([], [0])
    assert found["keys"] == ""
    assert found["pids"] == ["1", "2"]
    assert set(found["closed"].values()) <= {"EACCES", "EPERM", "ENOENT", "EIO"}, found["closed"]


async def test_no_kernel_setting_of_the_host_can_be_opened_for_writing(guests: Guests) -> None:
    """All of /proc/sys, one by one: a guest that was the host's uid 0 could open hundreds of them.

    Queues, shared memory and pids are its own namespaces'; what they take is charged to it.
    """
    found = await guests.run(
        READS
        + """
files = [os.path.join(top, name) for top, _, names in os.walk('/proc/sys') for name in names]
kernel = ('msg', 'sem', 'shm', 'auto_msgmni', 'pid_max', 'ns_last_pid')
own = ('/proc/sys/fs/mqueue/', *('/proc/sys/kernel/' + name for name in kernel))
opened = [path for path in files if opens(path, os.O_WRONLY) == 'opened' and not path.startswith(own)]
print(json.dumps({'tried': len(files), 'opened': opened}))
"""
    )
    assert found["tried"] > 300
    assert found["opened"] == []


async def test_dev_is_the_guests_own_and_cannot_be_added_to(guests: Guests) -> None:
    """The nodes that programs expect, no disk, no memory, no terminal of the host's; no node can be made."""
    found = await guests.run(
        READS
        + """
import stat
def node(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 1))
        return 'made'
    except OSError as error: return errno.errorcode[error.errno]
print(json.dumps({'there': sorted(os.listdir('/dev')), 'made': [node('/dev/x'), node('/tmp/x')],
                  'written': opens('/dev/x', 65)}))
"""
    )
    expected = {"core", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout"}
    assert set(found["there"]) <= expected | {"tty", "urandom", "zero", "console"}
    assert found["made"] == ["EROFS", "EPERM"]
    assert found["written"] == "EROFS"


async def test_a_crash_in_a_guest_leaves_no_core_and_can_start_no_handler(guests: Guests) -> None:
    """RLIMIT_CORE is 1 for good, the one value with which the kernel feeds no pipe; none sets it."""
    found = await guests.run(
        READS
        + """
import resource, signal, subprocess
os.chdir('/tmp')
for value in ((0, 0), (1, 1)):
    resource.setrlimit(resource.RLIMIT_CORE, value)
told = subprocess.run(['sh', '-c', 'ulimit -c 0; ulimit -c; kill -SEGV $$'], capture_output=True, text=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
print(json.dumps({'limit': resource.getrlimit(resource.RLIMIT_CORE), 'end': told.returncode,
                  'left': os.listdir('.'), 'other': resource.getrlimit(resource.RLIMIT_NOFILE)}))
"""
    )
    assert found == {"limit": [1, 1], "end": -signal.SIGSEGV, "left": [], "other": [50, 50]}


async def test_every_limit_of_a_process_is_hard(guests: Guests) -> None:
    """They hold where control groups do not, and a guest cannot raise one."""
    found = await guests.run(
        READS
        + """
import resource
def raised(name):
    try:
        resource.setrlimit(getattr(resource, f'RLIMIT_{name}'), (2**20, 2**20))
        return name
    except (ValueError, PermissionError): return ''
names = ('CORE', 'NOFILE', 'MSGQUEUE', 'NPROC', 'MEMLOCK', 'SIGPENDING', 'RTPRIO', 'NICE')
limits = {name: resource.getrlimit(getattr(resource, f'RLIMIT_{name}')) for name in names}
print(json.dumps({'limits': limits, 'raised': [raised(name) for name in ('NOFILE', 'NPROC', 'MEMLOCK')]}))
"""
    )
    limits = found["limits"]
    assert all(soft == hard for soft, hard in limits.values()), limits
    assert {name: soft for name, (soft, _) in limits.items()} == {
        "CORE": 1, "NOFILE": 4096, "MSGQUEUE": 0, "NPROC": 512, "MEMLOCK": 65536, "SIGPENDING": 4096,
        "RTPRIO": 0, "NICE": 0,
    }  # fmt: skip
    assert found["raised"] == ["", "", ""]


@pytest.mark.needs("root")
async def test_memory_that_is_no_file_counts_too(guests: Guests) -> None:
    """Shared segments and memfds are charged to the guest, like its tmpfs: none is a way around the limit."""
    script = """
import mmap, os
print('begun', flush=True)
held = []
for number in range(64):
    one = os.memfd_create('x')
    os.ftruncate(one, 2**26)
    area = mmap.mmap(one, 2**26)
    for at in range(0, 2**26, 4096): area[at] = 1
    held.append(area)
    print('held', number, flush=True)
"""
    machine = guests.create(script, memory=128, user_config='{"filesystem": {"tmpfs_size_mb": 16}}')
    await until(lambda: machine.state == "exited", machine)
    assert "killed for memory" in str(machine.events)
    assert "held 3" not in machine.console.read_text()


STUBBORN = """
import os, signal, time
for number in (1, 2, 3, 15, 17): signal.signal(number, signal.SIG_IGN)
for _ in range(40):
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        break
print('up', flush=True)
time.sleep(600)
"""


def _of(uid: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["uids"]):
        with contextlib.suppress(psutil.Error):
            uids = process.info["uids"]
            if uids is not None and uids.real == uid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


WAYS = {
    "cgroup.kill": ({"kill", "v2"}, False),
    "the freezer": ({"freezer", "memory", "pids"}, False),
    "groups that only list": ({"memory", "pids"}, False),
    "the namespace's init": (set(), False),
    "the death of a stage that hangs": (set(), True),
}


@pytest.mark.needs("root")
@pytest.mark.parametrize("way", WAYS)
async def test_a_whole_tree_dies_by_each_way_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Forty daemons that ignore signals; white box: the other ways are taken from the driver."""
    kinds, hangs = WAYS[way]
    hierarchies = bench.groups._hierarchies
    there = {kind for kind, _ in hierarchies}
    if kinds and not kinds & there:
        pytest.skip(f"this host has none of {sorted(kinds)}")
    monkeypatch.setattr(bench.groups, "_hierarchies", [one for one in hierarchies if one[0] in kinds])
    monkeypatch.setattr(driver, "_END_TIMEOUT", 0.5)
    killed: list[Any] = []
    kill = cgroups._kill

    def noted(groups: list[Path]) -> None:
        killed.append(groups)
        kill(groups)

    monkeypatch.setattr(cgroups, "_kill", noted)
    async with bench.running(STUBBORN) as sandbox:
        await until(lambda: "up" in bench.log.read_text() and len(_of(UID)) > 40)
        if hangs:
            sandbox.stage.send_signal(signal.SIGSTOP)
        await sandbox.destroy()
    await until(lambda: _of(UID) == [])
    assert bench.groups.leftovers() == []
    assert any(killed[0]) == bool(kinds)


@pytest.mark.needs("root")
async def test_a_vmm_that_stops_reading_does_not_keep_its_guests_alive(bench: Bench) -> None:
    """The stage ends everything below it once its control socket closes, whoever closes it."""
    async with bench.running(STUBBORN) as sandbox:
        await until(lambda: "up" in bench.log.read_text())
        sandbox.control.close()
        await until(lambda: _of(UID) == [])
        async with asyncio.timeout(20):
            await sandbox.stage.wait()
        assert not Path(f"/proc/{sandbox.pid}").exists()


@pytest.mark.needs("root")
async def test_a_stage_that_is_killed_while_bubblewrap_starts_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before bubblewrap could ask for its parent's death, and where no control group knows of it."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        slow = folder / "bwrap"
        slow.write_text("#!/bin/sh\necho starting\nexec sleep 600\n")
        slow.chmod(0o755)
        monkeypatch.setattr(driver, "_program", lambda name: str(slow) if name == "bwrap" else None)
        monkeypatch.setattr(bench.groups, "_hierarchies", [])
        async with bench.running("") as sandbox:
            await until(lambda: "starting" in bench.log.read_text())
            assert len(_of(UID)) == 2
            sandbox.stage.kill()
            await until(lambda: _of(UID) == [])
