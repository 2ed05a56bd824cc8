"""What the guest agent of a VM that has booted tells its VMM: the methods that a validator calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.dstack_double.host import Host, Machine
from tests.dstack_double.messages import Refused

MIB = 1024**2
USED = 96 * MIB
"""What every guest says that it uses of its memory."""
DISK_USED = 40 * MIB
RECEIVED, SENT = 7_000, 5_000


def answer(host: Host, method: str, vm_id: str) -> dict[str, Any]:
    """An answer. Raises Refused: no such method, no such VM, or no agent that answers."""
    made = _METHODS.get(method)
    if made is None:
        raise Refused("Failed to handle request", f"Method not found: {method}")
    machine = host.found(vm_id, "Failed to call guest agent")
    if not machine.running or host.progress(machine) not in ("done", "running"):
        raise Refused("Failed to call guest agent", "guest agent is not reachable")
    return made(machine)


def _sys_info(machine: Machine) -> dict[str, Any]:
    total = machine.configuration["memory"] * MIB
    disk = machine.configuration["disk_size"] * 1024 * MIB
    return {
        "os_name": "DStack",
        "os_version": "0.5.5",
        "kernel_version": "6.9.0-dstack",
        "cpu_model": "Intel(R) Xeon(R)",
        "num_cpus": machine.configuration["vcpu"],
        "total_memory": total,
        "available_memory": total - USED,
        "used_memory": USED,
        "free_memory": total - USED,
        "total_swap": 0,
        "used_swap": 0,
        "free_swap": 0,
        "uptime": 63,
        "loadavg_one": 12,
        "loadavg_five": 3,
        "loadavg_fifteen": 1,
        "disks": [
            {"name": "/dev/vdb", "mount_point": place, "total_size": disk, "free_size": disk - DISK_USED}
            for place in ("/dstack", "/var/lib/docker")
        ],
    }


def _network_info(machine: Machine) -> dict[str, Any]:
    del machine
    quiet = {"rx_errors": 0, "tx_errors": 0}
    wired = [{"address": "10.0.2.15", "prefix": 24}]
    return {
        "dns_servers": ["10.0.2.3"],
        "gateways": [{"address": "10.0.2.2"}],
        "interfaces": [
            {"name": "lo", "addresses": [], "rx_bytes": 900, "tx_bytes": 900} | quiet,
            {"name": "enp0s1", "addresses": wired, "rx_bytes": RECEIVED, "tx_bytes": SENT} | quiet,
            {"name": "docker0", "addresses": [], "rx_bytes": SENT, "tx_bytes": RECEIVED} | quiet,
        ],
        "wg_info": "",
    }


_METHODS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "SysInfo": _sys_info,
    "NetworkInfo": _network_info,
}
