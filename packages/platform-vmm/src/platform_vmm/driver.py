"""The port of what makes guests: how the VMM starts one, waits for its end, and takes it down."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from platform_vmm.sandbox.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Usage:
    """What a guest uses. None: the host does not count it; a disk of 0 bytes: it cannot be looked at."""

    cpu_time_ms: int | None
    memory_bytes: int
    memory_peak_bytes: int | None
    disk_total_bytes: int
    disk_free_bytes: int
    rx_bytes: int
    tx_bytes: int


class Guest(Protocol):
    """One running guest."""

    @property
    def pid(self) -> int:
        """Its first process, as the host sees it."""

    @property
    def walled(self) -> bool:
        """Whether a packet filter stands in it, beside the network namespace that has only `lo`."""

    async def exited(self) -> int | None:
        """Wait for its end: the exit code of what it ran, or None when it was taken down from outside."""

    def terminate(self) -> None:
        """Ask it to end by itself; whether it heeds that shows in `exited`."""

    def oom_kills(self) -> int:
        """How many of its processes the kernel killed for memory, where it counts them."""

    def usage(self) -> Usage:
        """What it uses now, and used since its start."""

    async def destroy(self) -> None:
        """Kill all of it and free everything. Safe to call again.

        Raises:
            TimeoutError: Something of it does not die; it is still there.
            OSError: The host refused something; it may still be there.
        """


class GuestDriver(Protocol):
    """One way of making guests."""

    @property
    def level(self) -> str:
        """The isolation level that its guests have, as ListImages tells it: Container or Vm."""

    @property
    def note(self) -> str:
        """What its guests are, for people."""

    @property
    def missing(self) -> str | None:
        """What it needs and this machine lacks, with what to do; None when all is there."""

    @property
    def weaker(self) -> list[str]:
        """Guarantees that it gives elsewhere and not on this machine."""

    async def start(
        self, name: str, recipe: Recipe, *, uid: int, log: Path, forwards: list[tuple[socket.socket, int]]
    ) -> Guest:
        """Start a guest. `forwards`: listening host sockets, each with the guest's port behind it.

        The sockets are the guest's from now on, also when this fails. `uid` is the guest's own on the
        host, `log` where its console goes.

        Raises:
            VmmError: It could not be made; nothing of it is left.
        """
