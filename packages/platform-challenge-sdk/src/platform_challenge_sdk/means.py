"""What a CVM has for its submissions: memory, disk, processes, a way out. Pure but for the kernel's word."""

from __future__ import annotations

import base64
import resource
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

MIB = 1024 * 1024
KEPT = 128 * MIB
"""Bytes of the CVM's memory that are the SDK's own."""
_MEMORY, _DISK = 256 * MIB, 64 * MIB
PROCESSES = 128
"""Of one run, threads included."""
_LEAST_PROCESSES, _AROUND, _KEPT_PROCESSES = 16, 3, 64
"""What a run has in any case; what holds it (stage and bubblewrap); and what is the SDK's own."""


@dataclass(frozen=True, slots=True)
class Egress:
    """The egress proxy and what it knows us by; `forbidden`: hosts that are asked for in no case."""

    host: str
    port: int
    authorization: bytes = field(repr=False)
    forbidden: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Means:
    """`memory`: bytes of the CVM as its challenge declares them; None: as the kernel tells.

    `egress` None: nothing may go out. `jobs`: how many there may be at once.
    """

    memory: int | None = None
    egress: Egress | None = None
    jobs: int = 1

    @property
    def most(self) -> int:
        """Bytes that a run may have of memory, and of disk, which is memory too."""
        told = _kernels_memory()
        return (told if self.memory is None else min(self.memory, told)) - KEPT

    @property
    def processes(self) -> int:
        """Processes of a run: PROCESSES, or what leaves as many to the other jobs where we may have few."""
        ours, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        if ours == resource.RLIM_INFINITY:
            return PROCESSES
        fair = (ours - _KEPT_PROCESSES) // self.jobs - _AROUND
        return max(_LEAST_PROCESSES, min(PROCESSES, fair))

    def share(self, memory: int | None, disk: int | None) -> tuple[int, int, int]:
        """(memory of the tree, address space of each process, disk) of a run that asks for so much.

        What is not asked for is 256 MiB and 64 MiB, or what there is.

        Raises:
            ValueError: More than there is.
        """
        most = self.most
        if most <= 0:
            raise ValueError(f"a CVM that runs submissions needs more than {KEPT // MIB} MiB of memory")
        for name, asked in (("memory", memory), ("disk", disk)):
            if asked is not None and asked > most:
                raise ValueError(
                    f"{name}: expected at most {most} bytes, got {asked}: the CVM's memory less "
                    f"{KEPT // MIB} MiB for the SDK; ask for less, or raise cvm.memory_mb in platform.toml"
                )
        tree = min(_MEMORY, most) if memory is None else memory
        return tree, _MEMORY if memory is None else memory, min(_DISK, most) if disk is None else disk


def read_egress(proxy_url: str | None, validator_base_url: str) -> Egress | None:
    """The way out that user_config names."""
    if proxy_url is None:
        return None
    proxy = urlsplit(proxy_url)
    name, password = unquote(proxy.username or ""), unquote(proxy.password or "")
    authorization = b"Basic " + base64.b64encode(f"{name}:{password}".encode())
    host = proxy.hostname or ""
    hosts = {host.lower(), (urlsplit(validator_base_url).hostname or "").lower()}
    return Egress(host, proxy.port or 80, authorization, frozenset(hosts - {""}))


def _kernels_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo: expected a line MemTotal")
