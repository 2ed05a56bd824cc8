"""What a guest may use: proven by guests that want more."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
from guests import Guests, serial, until
from running_vmm import Bench

from platform_vmm import machine as machine_module
from platform_vmm.machine import Machine
from platform_vmm.sandbox.cgroups import ControlGroups
from platform_vmm.sandbox.console import boots


@pytest.mark.needs("root")
async def test_a_guest_that_outgrows_its_memory_is_killed_and_the_event_says_so(guests: Guests) -> None:
    """RAM and disk share one limit, for a page of tmpfs is memory; mem_limit lowers the RAM's part."""
    hog = (
        "print('begun', flush=True); held = [bytearray(2**26) for _ in range(40)]; print('held', flush=True)"
    )
    machine = guests.create(hog, memory=512, service={"mem_limit": "64m"})
    await until(lambda: machine.state == "exited", machine)
    assert "begun" in serial(machine)
    assert "held" not in serial(machine)
    assert "exit code 137, 1 killed for memory" in str(machine.events)


@pytest.mark.needs("root")
async def test_one_process_killed_for_memory_is_told_and_the_guest_goes_on(
    guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a submission takes too much: its score is higher than the SDK's, which lives to tell."""
    monkeypatch.setattr(machine_module, "OOM_LOOK", 0.05)
    script = """
import os, time
child = os.fork()
if child == 0:
    open('/proc/self/oom_score_adj', 'w').write('1000')
    held = [bytearray(2**26) for _ in range(40)]
print('a child ended with', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
time.sleep(600)
"""
    machine = guests.create(script, memory=128, user_config='{"filesystem": {"tmpfs_size_mb": 16}}')
    await until(lambda: "a child ended with -9" in serial(machine), machine)
    await until(lambda: "1 of its processes killed for memory; it goes on" in str(machine.events), machine)
    assert machine.state == "running"


@pytest.mark.needs("root")
async def test_a_guest_gets_the_cpu_it_asked_for_and_no_more(guests: Guests) -> None:
    """Two burners on one virtual CPU use one CPU's time."""
    burn = """
import json, os, resource, time
end = time.monotonic() + 1.5
child = os.fork()
while time.monotonic() < end: pass
if child == 0: os._exit(0)
os.wait()
used = sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps([used]))
"""
    (used,) = await guests.run(burn, vcpu=1)
    assert used < 1.9


async def test_small_files_fill_their_own_cap(guests: Guests) -> None:
    """Inodes are capped too: a million empty files do not become a million host inodes."""
    (made,) = await guests.run("""
import json
made = 0
try:
    for made in range(10**6): open(f'/tmp/{made}', 'x').close()
except OSError as error: print(error)
print(json.dumps([made]))
""")
    assert 60_000 < made < 65_536


async def test_namespaces_can_be_nested_but_not_piled_up(guests: Guests) -> None:
    """A flood of user namespaces ends at the guest's own cap, not at the kernel's memory."""
    (made,) = await guests.run("""
import ctypes, json, os
libc = ctypes.CDLL(None, use_errno=True)
made = 0
for _ in range(400):
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(done, b'1' if libc.unshare(0x10000000) == 0 else b'0')
        os.read(os.pipe()[0], 1)
    made += os.read(ready, 1) == b'1'
    os.close(ready); os.close(done)
print(json.dumps([made]), flush=True)
os.kill(-1, 9)
""")
    assert 50 < made <= 128


async def test_the_control_groups_that_limit_a_guest_cannot_be_mounted_in_it(guests: Guests) -> None:
    """Where the VMM is an ordinary user their files would be the guest's own: it could lift its limits."""
    found = await guests.run("""
import ctypes, errno, json, os
libc = ctypes.CDLL(None, use_errno=True)
def outcome(result): return 'done' if result == 0 else errno.errorcode[ctypes.get_errno()]
found = {'own': outcome(libc.unshare(0x12020000))}
libc.unshare(0x10020000)
for kind, options in ((b'cgroup2', b''), (b'cgroup', b'memory'), (b'cgroup', b'pids')):
    found[(kind + options).decode()] = outcome(libc.mount(b'none', b'/tmp', kind, 0, options))
print(json.dumps(found | {'tmpfs': outcome(libc.mount(b'none', b'/tmp', b'tmpfs', 0, b''))}))
""")
    assert found.pop("own") == "ENOSPC"
    assert found.pop("tmpfs") == "done"
    assert found["cgroup2"] == "EPERM"
    assert "done" not in found.values()


async def test_tmpfs_of_the_compose_file_is_a_writable_place_on_the_same_disk(guests: Guests) -> None:
    """`tmpfs: [/scratch]` adds a place, not a disk."""
    found = await guests.run(
        """
import json, os
open('/scratch/x', 'w').close()
print(json.dumps([os.stat('/scratch').st_dev == os.stat('/tmp').st_dev, os.statvfs('/scratch').f_blocks > 0]))
""",
        service={"tmpfs": ["/scratch"]},
    )
    assert found == [True, True]


@pytest.mark.robustness(24, "lines")
async def test_a_flood_on_the_console_is_counted_and_each_boot_is_kept_apart(guests: Guests) -> None:
    """The first MiB stays; four boots are kept; the guest that floods ends in time."""
    machine = guests.create("import sys\nfor _ in range(300): sys.stdout.write('x' * 100_000)")
    await until(lambda: machine.state == "exited", machine)
    assert machine.console.stat().st_size < 1.1 * 2**20
    assert "bytes more were written and not kept" in serial(machine)
    for _ in range(4):
        files = [path.stat().st_ino for path in boots(machine.console)]
        machine.start()
        await until(partial(_next_boot_over, machine, files[-1]), machine)
    assert len(list(machine.folder.glob("serial.log*"))) == 4


def _next_boot_over(machine: Machine, earlier: int) -> bool:
    return machine.state == "exited" and machine.console.stat().st_ino != earlier


@pytest.mark.needs("root")
async def test_groups_made_from_another_place_are_found_again(tmp_path: Path) -> None:
    """A VMM started from another control group still finds and removes what it left, by its ledger."""
    ledger, name = tmp_path / "cgroups.json", f"platform-vmm-test-{os.getpid()}"
    elsewhere = Path("/sys/fs/cgroup/pids") / f"elsewhere-{os.getpid()}"
    if not elsewhere.parent.is_dir():
        pytest.skip("this host has no version 1 hierarchy to stand elsewhere in")
    left = elsewhere / name / "sandbox"
    left.mkdir(parents=True)
    try:
        ledger.write_text(f'["{elsewhere / name}"]')
        groups = ControlGroups(name, ledger=ledger)
        assert await groups.reclaim() == ["sandbox"]
        assert not (elsewhere / name).exists()
        assert str(elsewhere) not in ledger.read_text()
        groups.close()
    finally:
        elsewhere.rmdir()


async def test_without_control_groups_a_guest_s_living_processes_are_counted(bench: Bench) -> None:
    """Neither a peak nor what has ended is known then; what is told is of the guest and nothing else."""
    nowhere = bench.folder / "no-groups"
    nowhere.mkdir()
    bench.groups = ControlGroups("none", root=nowhere)
    script = """
import time
end = time.process_time() + 0.3
while time.process_time() < end: pass
held = bytearray(b'x') * 2**25
open('/tmp/file', 'wb').write(bytes(2**20))
print('ready', flush=True)
time.sleep(600)
"""
    async with bench.running(script) as sandbox:
        await until(lambda: "ready" in bench.log.read_text())
        used = sandbox.usage()
    assert used.memory_peak_bytes is None
    assert used.cpu_time_ms is not None
    assert 300 <= used.cpu_time_ms < 60_000
    assert 2**25 < used.memory_bytes < 2**28
    assert 2**20 <= used.disk_total_bytes - used.disk_free_bytes < 2**22
    assert (used.rx_bytes, used.tx_bytes) == (0, 0)


def test_version_2_groups_count_the_same_under_other_names(tmp_path: Path) -> None:
    """A file that this kernel does not have leaves its figure out."""
    (tmp_path / "cgroup.controllers").write_text("memory cpu pids")
    groups = ControlGroups("vmm", root=tmp_path)
    group = tmp_path / "vmm" / "one"
    group.mkdir(parents=True)
    for name, text in (
        ("memory.current", "300\n"),
        ("memory.events", "low 0\noom 2\noom_kill 1\n"),
        ("cpu.stat", "usage_usec 2500999\nuser_usec 1\n"),
    ):
        (group / name).write_text(text)
    assert groups.usage("one") == {"memory_bytes": 300, "oom_kills": 1, "cpu_time_ms": 2500}
