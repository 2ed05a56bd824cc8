"""States, restarts, shutdown and lifetime of a VM, as dstack's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from guests import Guests, serial, until

from platform_vmm.machine import Machine
from platform_vmm.machines import guest_uids
from platform_vmm.prpc import describe, elapsed
from platform_vmm.restarts import RestartPolicy


@pytest.mark.parametrize(("failures", "pause"), [(1, 5.0), (2, 10.0), (5, 80.0), (6, None)])
def test_restarts_back_off_and_are_exhausted_after_five(failures: int, pause: float | None) -> None:
    """5 s doubling; the sixth failure in a row stays exited."""
    assert RestartPolicy().pause(failures) == pause


def test_the_pause_is_never_longer_than_the_most_and_a_long_boot_counts_anew() -> None:
    """300 s at most; who ran that long starts at the first failure again."""
    policy = RestartPolicy(tries=50)
    assert policy.pause(40) == 300.0
    assert policy.count(4, lasted=10.0) == 5
    assert policy.count(4, lasted=301.0) == 1


async def test_a_crashing_guest_is_restarted_and_at_last_left_exited(make_guests: Any) -> None:
    """Every boot is in the log; the events say that the restarts are exhausted; StopVm settles it."""
    async with make_guests(restarts=RestartPolicy(first=0.001, tries=2)) as guests:
        machine = guests.create(["sh", "-c", "echo crashed; exit 7"])
        await until(lambda: "exhausted" in str(machine.events), machine)
        assert machine.state == "exited"
        assert serial(machine).count("crashed") == 3
        assert sum(event["body"] == "exit code 7" for event in machine.events) == 3
        assert describe(machine, brief=True)["exited_at"] != "never"
        machine.start()
        await until(lambda: serial(machine).count("crashed") > 3, machine)
        machine.stop()
        await until(lambda: machine.state == "stopped", machine)


async def test_a_boot_error_is_told_and_the_vm_is_exited(guests: Guests) -> None:
    """The digest of another runtime: boot_error names both."""
    machine = guests.create(["true"], service={"image": "platform-runtime@sha256:" + "0" * 64})
    await until(lambda: machine.state == "exited", machine)
    assert guests.runtime.digest in machine.boot_error
    assert machine.boot_progress == "booting"


@pytest.mark.parametrize(
    ("app", "key"),
    [
        ({"kms_enabled": True}, "kms_enabled"),
        ({"gateway_enabled": True}, "gateway_enabled"),
        ({"key_provider": "kms"}, "key_provider"),
        ({"pre_launch_script": "true"}, "pre_launch_script"),
        ({"init_script": "true"}, "init_script"),
        ({"init_script": ["true"]}, "init_script"),
        ({"runner": "bash"}, "runner"),
        ({"manifest_version": 9}, "manifest_version"),
    ],
)
async def test_what_app_compose_asks_for_and_is_not_here_is_a_boot_error(
    guests: Guests, app: dict[str, Any], key: str
) -> None:
    """Nothing that was measured is silently left out."""
    machine = guests.create(["true"], app=app)
    await until(lambda: machine.boot_error.startswith(key), machine)


async def test_while_it_boots_a_vm_is_running_never_exited(guests: Guests) -> None:
    """From CreateVm's answer on; a client that sees `exited` takes the VM for dead."""
    machine = guests.create(["sleep", "60"])
    seen = {machine.state}
    while machine.boot_progress != "done":
        await asyncio.sleep(0)  # each turn of the loop is looked at
        seen.add(machine.state)
    assert seen == {"running"}
    words = [event["body"] for event in machine.events if event["event"] == "boot.progress"]
    assert words == [
        "booting",
        "initializing data disk",
        "setting up docker",
        "starting containers",
        "done",
    ]
    assert "instance.info" in [event["event"] for event in machine.events]


async def test_shutdown_asks_the_guest_and_stop_does_not(guests: Guests) -> None:
    """ShutdownVm: SIGTERM to the guest's first process, time to end; then it is stopped, not exited."""
    script = """
import signal, sys
def end(*_):
    print('said goodbye', flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print('up', flush=True)
signal.pause()
"""
    for act, goodbye in (("shutdown", True), ("stop", False)):
        machine = guests.create(script)
        await until(partial(_says, machine, "up"), machine)
        getattr(machine, act)()
        assert machine.state == "stopping"
        await until(partial(_is, machine, "stopped"), machine)
        assert ("said goodbye" in serial(machine)) is goodbye
        assert (machine.shutdown_progress == "powering off") is goodbye


async def test_a_guest_that_ignores_shutdown_can_still_be_stopped(guests: Guests) -> None:
    """StopVm during the grace time does not wait for it."""
    deaf = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    machine = guests.create(deaf)
    await until(lambda: "up" in serial(machine), machine)
    machine.shutdown()
    began = time.monotonic()
    machine.stop()
    await until(lambda: machine.state == "stopped", machine)
    assert time.monotonic() - began < 5


async def test_hard_lifetime_counts_from_creation_and_not_from_each_boot(make_guests: Any) -> None:
    """A VM that is older than its hard lifetime is stopped at once when its VMM comes back."""
    async with make_guests() as guests:
        machine = guests.create(["sleep", "60"], user_config='{"hard_lifetime_s": 1000}')
        await until(lambda: machine.boot_progress == "done", machine)
        machine.record.created_at -= 2000
        machine.record.save(machine.folder)
    async with make_guests() as guests:
        (machine,) = guests.machines.all()
        await until(lambda: machine.state == "stopped", machine)
        assert "vm.lifetime" in [event["event"] for event in machine.events]


async def test_a_guest_that_is_stopped_with_all_its_processes_does_not_outlive_its_hard_lifetime(
    guests: Guests,
) -> None:
    """What ends it asks nothing of the guest: SIGSTOP, or no time on any core, holds nothing up."""
    stopped = ["python3", "-c", "import os, signal; os.kill(0, signal.SIGSTOP)"]
    machine = guests.create(stopped, user_config='{"hard_lifetime_s": 1}')
    await until(lambda: machine.boot_progress == "done", machine)
    await until(lambda: machine.state == "stopped", machine)
    assert "vm.lifetime" in [event["event"] for event in machine.events]


async def test_a_host_port_that_something_else_has_is_a_boot_error(guests: Guests) -> None:
    """The text is QEMU's, so that a client for dstack knows it."""
    ports = [{"protocol": "tcp", "host_port": guests.guest_port, "vm_port": 10000}]
    machine = guests.create(["true"], ports=ports)
    await until(lambda: "Could not set up host forwarding rule" in machine.boot_error, machine)


async def test_removal_works_at_every_moment_of_a_boot(guests: Guests) -> None:
    """Remove after each progress word: it goes, and nothing of it stays."""
    for word in ("booting", "initializing data disk", "setting up docker", "starting containers", "done"):
        machine = guests.create(["sleep", "60"])
        while word not in [event["body"] for event in machine.events]:
            await asyncio.sleep(0)  # each turn of the loop: the moment itself, and not one after it
        await guests.remove(machine)
        assert not machine.folder.exists()


@pytest.mark.needs("root")
async def test_twenty_vms_come_and_go_and_leave_nothing(guests: Guests, free_port: int) -> None:
    """No process, mount, control group, file or descriptor; every fourth is removed while booting."""
    ports = [{"protocol": "tcp", "host_port": free_port, "vm_port": 10000}]
    fork_and_leave = (
        "import os, signal\n"
        "for n in range(64): signal.signal(n, signal.SIG_IGN) if n not in (0, 9, 19, 32, 33) else 0\n"
        "for _ in range(20):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        break\n"
        "print('up', flush=True)\n"
        "signal.pause()\n"
    )
    before = None
    for cycle in range(20):
        machine = guests.create(fork_and_leave, ports=ports)
        if cycle % 4:
            await until(partial(_says, machine, "up"), machine)
        await guests.remove(machine)
        if cycle == 1:
            before = _left(guests)
    assert before is not None
    await until(lambda: _left(guests) == before, f"{before} then {_left(guests)}")
    assert _left(guests)["uids"] == 0


@pytest.mark.needs("root")
@pytest.mark.slow(reason="boots ten guests")
async def test_a_stage_that_is_killed_at_any_moment_of_a_boot_leaves_nothing(
    guests: Guests, free_port: int
) -> None:
    """Its guest ends with it, the VM is exited, and when it is removed all is as before."""
    ports = [{"protocol": "tcp", "host_port": free_port, "vm_port": 10000}]
    layers = json.dumps({"filesystem": {"read_only": False}})
    before = None
    for cycle, pause in enumerate((0.2, 0, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2)):
        machine = guests.create(["sleep", "60"], ports=ports, user_config=layers if cycle % 2 else "")
        while not (stages := psutil.Process().children()):
            await asyncio.sleep(0)
        await asyncio.sleep(pause)
        stages[0].kill()
        await until(partial(_is, machine, "exited"), machine)
        await guests.remove(machine)
        if before is None:
            await until(lambda: _left(guests)["uids"] == 0)  # orphans, which the system's init reaps
            before = _left(guests)
    await until(lambda: _left(guests) == before, f"{before} then {_left(guests)}")


def _says(machine: Machine, word: str) -> bool:
    return word in serial(machine)


def _is(machine: Machine, state: str) -> bool:
    return machine.state == state


def _left(guests: Guests) -> dict[str, int]:
    known, uids = guest_uids(guests.state.path), 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                uids += entry.stat().st_uid in known
    return {
        "uids": uids,
        "groups": len(guests.machines._groups.leftovers()),
        "mounts": Path("/proc/self/mountinfo").read_text().count("\n"),
        "fds": len(list(Path("/proc/self/fd").iterdir())),
        "files": len(list(guests.state.vms.rglob("*"))),
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (63, "1m 3s"), (3600, "1h"), (90_061, "1day 1h 1m 1s"), (200_000, "2days 7h 33m 20s")],
)
def test_durations_are_shown_as_dstack_shows_them(seconds: float, text: str) -> None:
    """Uptime is for people: humantime's form."""
    assert elapsed(seconds) == text
