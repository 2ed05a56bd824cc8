"""dstack's pRPC in JSON: the calls that the validator uses, as the VMM of August 2026 answers them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import psutil

from platform_vmm.app_compose import read_app_compose
from platform_vmm.configuration import read_configuration
from platform_vmm.errors import VmmError
from platform_vmm.images import IMAGE, RuntimeTable
from platform_vmm.machine import Machine
from platform_vmm.machines import Machines

VERSION = "0.6.0"
REVISION = "platform-vmm: local, not a TEE"
Handler = Callable[[dict[str, Any]], Any]


class Prpc:
    """Answers a method by name. Every refusal is a VmmError, told as 400."""

    def __init__(self, machines: Machines, runtimes: RuntimeTable) -> None:
        self._machines = machines
        self._runtimes = runtimes
        self._methods: dict[str, Handler] = {
            "CreateVm": self._create,
            "StartVm": lambda args: self._machine(args).want(started=True),
            "StopVm": lambda args: self._machine(args).want(started=False),
            "ShutdownVm": lambda args: self._machine(args).want(started=False),
            "RemoveVm": lambda args: self._machine(args).remove(),
            "GetComposeHash": lambda args: {"hash": read_app_compose(str(args.get("compose_file", ""))).hash},
            "Status": self._status,
            "GetInfo": self._get_info,
            "ListImages": self._list_images,
            "ListGpus": lambda _: {"gpus": [], "allow_attach_all": False},
            "GetMeta": self._get_meta,
            "Version": lambda _: {"version": VERSION, "rev": REVISION},
        }

    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """The answer (JSON value; None for Empty).

        Raises:
            VmmError: The method is unknown, or refused.
        """
        handler = self._methods.get(method.removeprefix("Teepod."))
        if handler is None:
            raise VmmError(f"Method not found: {method[:64]}")
        return handler(arguments)

    @property
    def isolation_level(self) -> str:
        """What the sandbox driver gives on this host: Container, or Process without enforced limits."""
        return "Container" if self._machines.limits_hold or os.getuid() != 0 else "Process"

    def _machine(self, arguments: dict[str, Any]) -> Machine:
        return self._machines.get(str(arguments.get("id", "")))

    def _create(self, arguments: dict[str, Any]) -> dict[str, str]:
        return {"id": self._machines.create(read_configuration(arguments)).id}

    def _get_info(self, arguments: dict[str, Any]) -> dict[str, Any]:
        identity = str(arguments.get("id", ""))
        found = next((machine for machine in self._machines.all() if machine.id == identity), None)
        return {"found": found is not None, "info": None if found is None else describe(found, brief=False)}

    def _status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        ids, keyword = arguments.get("ids") or [], str(arguments.get("keyword") or "")
        page, size = _count(arguments, "page"), _count(arguments, "page_size")
        machines = [
            machine
            for machine in self._machines.all()
            if (not ids or machine.id in ids) and (not keyword or _matches(machine, keyword))
        ]
        shown = machines[(page - 1) * size : page * size] if page and size else machines
        brief = bool(arguments.get("brief"))
        return {
            "vms": [describe(machine, brief=brief) for machine in shown],
            "port_mapping_enabled": True,
            "total": len(machines),
        }

    def _list_images(self, _: dict[str, Any]) -> dict[str, Any]:
        description = {
            "isolation_level": self.isolation_level,
            "runtimes": self._runtimes.digests(),
            "local": True,
            "note": "a sandbox on this host's kernel; not a TEE",
            "limits": "control groups" if self._machines.limits_hold else "rlimits only",
        }
        image = {"name": IMAGE, "description": json.dumps(description), "version": VERSION, "is_dev": True}
        return {"images": [image]}

    def _get_meta(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "kms": {"url": "", "urls": []},
            "gateway": {"url": "", "base_domain": "", "port": 0, "agent_port": 0, "urls": []},
            "resources": {
                "max_cvm_number": 1000,
                "max_allocable_vcpu": os.cpu_count() or 1,
                "max_allocable_memory_in_mb": psutil.virtual_memory().total // 1024**2,
            },
            "networking": {"supported_modes": ["user"], "default_mode": "user", "default_bridge": ""},
        }


def describe(machine: Machine, *, brief: bool) -> dict[str, Any]:
    """A VM as dstack's VmInfo shows it."""
    configuration = machine.configuration.model_dump()
    for port in configuration["ports"]:
        port["host_address"] = port["host_address"] or "127.0.0.1"
    now = time.monotonic()
    return {
        "id": machine.id,
        "name": machine.configuration.name,
        "status": machine.state,
        "uptime": "0s" if machine.began is None else f"{int(now - machine.began)}s",
        "app_url": None,
        "app_id": machine.app_id,
        "instance_id": machine.instance_id,
        "configuration": None if brief else configuration,
        "exited_at": "never" if machine.ended is None else f"{int(now - machine.ended)}s",
        "boot_progress": machine.boot_progress,
        "boot_error": machine.boot_error,
        "shutdown_progress": machine.shutdown_progress,
        "image_version": VERSION,
        "events": list(machine.events),
        "interfaces": [],
    }


def _matches(machine: Machine, keyword: str) -> bool:
    names = (machine.configuration.name, machine.id, machine.app_id, machine.configuration.image)
    return any(keyword in name for name in names)


def _count(arguments: dict[str, Any], key: str) -> int:
    value = arguments.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise VmmError(f"Failed to decode request: {key}: expected a non-negative integer")
    return value
