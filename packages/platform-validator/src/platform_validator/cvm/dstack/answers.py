"""dstack's answers as the port's words: fields may be missing, null, or of a version yet to come."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from platform_protocol.compose import SDK_PORT
from platform_protocol.ids import VmId, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_validator.cvm.vmm import TlsAddress, Vm, VmmImage, VmState

_MOST = 2**31 - 1
_APP_URL = re.compile(r"https://([0-9a-f]{40})-8090\.([A-Za-z0-9.-]{1,200})(?::(\d{1,5}))?/?")


def read_vm(info: Mapping[str, Any], port_address: str) -> Vm:
    """A VmInfo. `port_address` is the host under which its mapped ports are reached."""
    configuration = _fields(info.get("configuration"))
    mapped = next((number(one.get("host_port")) for one in objects(configuration.get("ports"))), 0)
    gpus = _fields(configuration.get("gpus"))
    return Vm(
        id=VmId(_text(info.get("id"))),
        name=VmName(_text(info.get("name"))),
        state=_state(info.get("status")),
        boot_progress=_text(info.get("boot_progress")),
        boot_error=_text(info.get("boot_error"))[:4096],
        instance=_text(info.get("instance_id")) or None,
        address=(port_address, mapped) if mapped else gateway_address(info.get("app_url")),
        resources=Resources(
            cpu_cores=number(configuration.get("vcpu")),
            memory_mb=number(configuration.get("memory")),
            disk_mb=min(_MOST, number(configuration.get("disk_size")) * 1024),
            gpu_count=len(objects(gpus.get("gpus"))),
        ),
    )


def gateway_address(app_url: object) -> TlsAddress | None:
    """Where a gateway leads to the SDK: an app's URL names its port 8090, and others are named likewise."""
    found = _APP_URL.fullmatch(app_url) if isinstance(app_url, str) else None
    if found is None:
        return None
    instance, domain, port = found.groups()
    return TlsAddress((f"{instance}-{SDK_PORT}.{domain}", int(port or 443)))


def read_image(image: Mapping[str, Any]) -> VmmImage:
    """An image of ListImages. One without our description is dstack's own: a TDX image."""
    name = _text(image.get("name"))
    try:
        described = json.loads(image.get("description") or "{}")
    except (ValueError, TypeError, RecursionError):
        described = {}
    if not isinstance(described, dict) or "isolation_level" not in described:
        return VmmImage(name, IsolationLevel.TEE)
    try:
        level = IsolationLevel(described["isolation_level"])
    except ValueError:
        level = IsolationLevel.NONE
    runtimes = _fields(described.get("runtimes"))
    ports = described.get("guest_ports")
    return VmmImage(
        name,
        level,
        {str(key): str(value) for key, value in runtimes.items()},
        local=True,
        guest_ports=tuple(number(port) for port in ports) if isinstance(ports, list) else None,
    )


def objects(value: object) -> list[dict[str, Any]]:
    """The objects of a list; of anything else none."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def number(value: object) -> int:
    """A count; 0 for what is none."""
    return min(value, _MOST) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _fields(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _state(word: object) -> VmState:
    try:
        return VmState(str(word))
    except ValueError:
        return VmState.UNKNOWN
