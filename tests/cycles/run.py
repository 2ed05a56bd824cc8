"""The cycles: VMs of every ending, some killed while they boot, the VMM killed in between; then the count."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.demo.ports import free_ports
from tests.cycles.census import KINDS, Census, Place, become_the_counter, more, resident, take
from tests.cycles.vmm import Vmm

from platform_vmm.machines import guest_uids

ENDINGS = {
    "ends": "echo up",
    "ignores signals": (
        "trap '' TERM HUP INT; (setsid sh -c \"trap '' TERM HUP; sleep 600\" &) ; echo up; "
        "while :; do sleep 600; done"
    ),
    "holds namespaces": (
        "unshare -Urmpf --mount-proc sleep 600 & head -c 3000000 /dev/zero >/tmp/x; echo up; wait"
    ),
}
"""What a guest does; the last two are removed while they run."""
LAYERED_EVERY = 5
"""Each so many-th VM has a writable root and a hidden path: mounts of more kinds to leave behind."""
_LAYERED = {"read_only": False, "denied_paths": ["/usr/share"]}
BOOTING_EVERY = 4
"""Each so many-th VM is removed while it boots, at a random moment."""
WARM_UP = 10
_BOOT_S = 0.12
_PORTS = 8
_ROOM_BYTES, _ROOM_PER_CYCLE = 3 * 1024 * 1024, 1024
"""What a Python process's memory may move without being a leak: measured, SPEC.md has the figures."""


class Cycles:
    """`say` is told what happens; what goes has `settle` seconds to be gone before it counts as left."""

    def __init__(
        self, folder: Path, vmm: Vmm, *, seed: int, settle: float, say: Callable[[str], None]
    ) -> None:
        self._vmm = vmm
        self._settle = settle
        self._folder = folder
        self._rng = random.Random(seed)
        self._say = say
        self._ports = free_ports(_PORTS)
        self._left: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self._resident: list[int] = []
        self._took: list[float] = []
        self._done: Counter[str] = Counter()

    def run(self, cycles: int, kills: int, show: Callable[[int], None]) -> dict[str, Any]:
        """All of it. The VMM is killed `kills` times in the first half; the second shows its memory."""
        began = time.monotonic()
        become_the_counter()
        empty = take(None, Place(self._vmm.state, self._vmm.temporary, "", range(0)))
        self._vmm.make_image()
        self._vmm.start()
        place = Place(
            self._vmm.state,
            self._vmm.temporary,
            f"platform-vmm-{(self._vmm.state / 'id').read_text()}",
            guest_uids(self._vmm.state),
        )
        kill_at = {cycles // 2 * (number + 1) // (kills + 1) for number in range(kills)}
        idle: Census | None = None
        for number in range(cycles):
            if idle is None and number >= min(WARM_UP, cycles // 2):
                idle = take(self._vmm.pid, place)
            if number in kill_at:
                self._killed(number, place, idle)
            else:
                self._cycle(number)
            self._resident.append(resident(self._vmm.pid))
            show(number + 1)
        assert idle is not None
        self._count("while the VMM lives", lambda: take(self._vmm.pid, place), idle)
        self._vmm.end(signal.SIGTERM)
        kept = take(None, place)["files"] & idle["files"]
        after = dict(empty) | {"files": kept}
        self._count("after the VMM's end", lambda: take(None, place), after)
        return self._report(cycles, time.monotonic() - began)

    def _cycle(self, number: int) -> None:
        began = time.monotonic()
        port = self._ports[number % len(self._ports)]
        filesystem = _LAYERED if number % LAYERED_EVERY == 0 else None
        if number % BOOTING_EVERY == BOOTING_EVERY - 1:
            identity = self._vmm.create(ENDINGS["ignores signals"], port, filesystem=filesystem)
            time.sleep(self._rng.uniform(0, _BOOT_S))
            self._done["killed_during_boot"] += not self._said_up(identity)
        else:
            ending = list(ENDINGS)[number % len(ENDINGS)]
            identity = self._vmm.create(ENDINGS[ending], port, filesystem=filesystem)
            self._vmm.until_said(identity, "up")
            if ending != "ends":
                _knock(port)
        self._vmm.remove(identity)
        self._took.append(time.monotonic() - began)

    def _said_up(self, identity: str) -> bool:
        log = self._vmm.state / "vms" / identity / "serial.log"
        with contextlib.suppress(FileNotFoundError):
            return "\nup" in log.read_text()
        return False

    def _killed(self, number: int, place: Place, idle: Census | None) -> None:
        """The VMM dies with one VM that runs and one that boots; the next one starts them, then both go."""
        one = self._vmm.create(ENDINGS["holds namespaces"], self._ports[0], filesystem=_LAYERED)
        self._vmm.until_said(one, "up")
        self._vmm.create(ENDINGS["ignores signals"], self._ports[1])
        time.sleep(self._rng.uniform(0, _BOOT_S))
        self._vmm.end(signal.SIGKILL)
        self._done["vmm_kills"] += 1
        self._vmm.start()
        removed = self._vmm.remove_all()
        if removed != 2:
            self._say(f"after the VMM's kill at cycle {number}: expected 2 VMs, found {removed}")
            self._left["lost_vms"] += abs(2 - removed)
        if idle is not None:
            self._count(f"after the VMM's kill at cycle {number}", lambda: take(self._vmm.pid, place), idle)

    def _count(self, when: str, taken: Callable[[], Census], before: Census) -> None:
        """What is going must have the time to go; what stays is a leak."""
        deadline = time.monotonic() + self._settle
        now = taken()
        while any(more(now, before).values()) and time.monotonic() < deadline:
            time.sleep(0.1)
            now = taken()
        for kind, count in more(now, before).items():
            if count:
                new = sorted(now[kind] - before[kind])
                self._say(f"{when}: {count} {kind} more than before: {new[:5]}")
            self._left[kind] = max(self._left[kind], count)

    def _report(self, cycles: int, seconds: float) -> dict[str, Any]:
        half = self._resident[len(self._resident) // 2 :]
        tenth = max(1, len(half) // 10)
        growth = int(statistics.median(half[-tenth:]) - statistics.median(half[:tenth]))
        self._left["memory"] = int(growth > _ROOM_BYTES + _ROOM_PER_CYCLE * len(half))
        return {
            "cycles": cycles,
            "leaks": self._left.total(),
            "by_kind": dict(self._left),
            "killed_during_boot": self._done["killed_during_boot"],
            "vmm_kills": self._done["vmm_kills"],
            "vmm_mb": round(half[-1] / 1024**2, 1),
            "vmm_growth_kb": growth // 1024,
            "ms_per_cycle_p50": round(statistics.median(self._took) * 1000),
            "seconds": round(seconds),
        }


def _knock(port: int) -> None:
    """A connection that the guest refuses has gone the whole way, by a socket of the sandbox's own."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as one:
        one.recv(1)
