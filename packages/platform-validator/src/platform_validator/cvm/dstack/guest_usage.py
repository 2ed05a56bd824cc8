"""Reads `SysInfo` and `NetworkInfo` of a guest agent. Untrusted: any field may be anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from platform_validator.cvm.dstack.answers import objects
from platform_validator.cvm.usage import VmUsage

_MOST = 2**53 - 1
"""What a result, which is JSON in canonical form, can hold."""
_INNER = ("lo", "wg", "docker", "br-", "veth")
"""Interfaces whose bytes stay inside, or go out through another one."""


def read_usage(system: dict[str, Any], network: dict[str, Any]) -> VmUsage:
    """The VM's usage. dstack counts no CPU time and keeps no peak; a local VMM adds both."""
    local = system.get("platform_vmm")
    more = local if isinstance(local, dict) else {}
    disks = {
        str(disk.get("name")): _difference(disk.get("total_size"), disk.get("free_size"))
        for disk in objects(system.get("disks"))
    }
    carried = [
        _count(interface.get(field))
        for interface in objects(network.get("interfaces"))
        if not str(interface.get("name")).startswith(_INNER)
        for field in ("rx_bytes", "tx_bytes")
    ]
    return VmUsage(
        cpu_time_ms=_count(more.get("cpu_time_ms")),
        memory_bytes=_count(system.get("used_memory")),
        memory_peak_bytes=_count(more.get("memory_peak_bytes")),
        disk_bytes=_sum(disks.values()),
        network_bytes=_sum(carried),
    )


def _count(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and isinstance(value, int) and 0 <= value <= _MOST else None


def _difference(total: object, free: object) -> int | None:
    most, left = _count(total), _count(free)
    return None if most is None or left is None or left > most else most - left


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return min(sum(known), _MOST) if known else None
