"""What dstack's guest agent tells of a running guest, told for a sandbox by its host."""

from __future__ import annotations

from typing import Any

from platform_vmm.configuration import VmConfiguration
from platform_vmm.driver import Usage


def sys_info(configuration: VmConfiguration, usage: Usage) -> dict[str, Any]:
    """`SysInfo`; `platform_vmm` has what dstack's answer has no field for. Bytes, but for that."""
    total = configuration.memory * 1024**2
    free = max(total - usage.memory_bytes, 0)
    disk = {
        "name": "tmpfs",
        "mount_point": "/",
        "total_size": usage.disk_total_bytes,
        "free_size": usage.disk_free_bytes,
    }
    return {
        "os_name": "sandbox",
        "num_cpus": configuration.vcpu,
        "total_memory": total,
        "available_memory": free,
        "used_memory": usage.memory_bytes,
        "free_memory": free,
        "total_swap": 0,
        "used_swap": 0,
        "free_swap": 0,
        "disks": [disk] if usage.disk_total_bytes else [],
        "platform_vmm": {"cpu_time_ms": usage.cpu_time_ms, "memory_peak_bytes": usage.memory_peak_bytes},
    }


def network_info(configuration: VmConfiguration, usage: Usage) -> dict[str, Any]:
    """`NetworkInfo`: the bytes that the sandbox's relays carried; it has no other network."""
    del configuration
    interface = {
        "name": "relay",
        "addresses": [],
        "rx_bytes": usage.rx_bytes,
        "tx_bytes": usage.tx_bytes,
        "rx_errors": 0,
        "tx_errors": 0,
    }
    return {"dns_servers": [], "gateways": [], "interfaces": [interface], "wg_info": ""}
