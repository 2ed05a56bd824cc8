"""dstack's pRPC in JSON: the calls that the validator uses, as the VMM of August 2026 answers them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from platform_vmm import guest
from platform_vmm.app_compose import read_app_compose
from platform_vmm.configuration import U32, read_configuration
from platform_vmm.errors import VmmError, VmNotFound
from platform_vmm.machine import Machine
from platform_vmm.machines import MOST_VMS, Machines

VERSION = "0.6.0-local"
REVISION = "platform-vmm: local, not a TEE"
Handler = Callable[[dict[str, Any]], Any]
_Message = TypeVar("_Message", bound=BaseModel)
_LO = {"mode": "user", "backend": "relay", "mac": "", "bridge_name": None, "netdev_id": "lo"}


class _Id(BaseModel):
    model_config = ConfigDict(extra="ignore")
    id: str = ""


class _Status(BaseModel):
    model_config = ConfigDict(extra="ignore")
    ids: list[str] = Field(default_factory=list)
    brief: bool = False
    keyword: str = ""
    page: U32 = 0
    page_size: U32 = 0


class _Hash(BaseModel):
    model_config = ConfigDict(extra="ignore")
    compose_file: str = ""


class Prpc:
    """Answers a method by name. Every refusal is a VmmError, told as 400."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._methods: dict[str, Handler] = {
            "CreateVm": lambda args: {"id": machines.create(read_configuration(args)).id},
            "StartVm": lambda args: self._machine(args).start(),
            "StopVm": lambda args: self._machine(args).stop(),
            "ShutdownVm": lambda args: self._machine(args).shutdown(),
            "RemoveVm": lambda args: self._machine(args).remove(),
            "GetComposeHash": lambda args: {"hash": read_app_compose(_read(_Hash, args).compose_file).hash},
            "Status": self._status,
            "GetInfo": self._get_info,
        }
        self._facts: dict[str, Callable[[], Any]] = {
            "ListImages": self._list_images,
            "ListGpus": lambda: {"gpus": [], "allow_attach_all": False},
            "GetMeta": _meta,
            "Version": lambda: {"version": VERSION, "rev": REVISION},
        }

    def call_guest(self, method: str, arguments: dict[str, Any]) -> Any:
        """The answer for a running guest's agent: of dstack's calls SysInfo and NetworkInfo.

        Raises:
            VmmError: The method is unknown, or there is no such guest.
        """
        shown = {"SysInfo": guest.sys_info, "NetworkInfo": guest.network_info}.get(method)
        if shown is None:
            raise VmmError(f"Method not found: {method[:64]}")
        machine = self._machine(arguments)
        return shown(machine.configuration, machine.usage())

    def takes_nothing(self, method: str) -> bool:
        """Whether a method's input is Empty: its message is not even read."""
        return method.removeprefix("Teepod.") in self._facts

    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """The answer (JSON value; None for Empty).

        Raises:
            VmmError: The method is unknown, or refused.
        """
        name = method.removeprefix("Teepod.")
        if name in self._facts:
            return self._facts[name]()
        handler = self._methods.get(name)
        if handler is None:
            raise VmmError(f"Method not found: {method[:64]}")
        return handler(arguments)

    def _machine(self, arguments: dict[str, Any]) -> Machine:
        return self._machines.get(_read(_Id, arguments).id)

    def _get_info(self, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            found = self._machine(arguments)
        except VmNotFound:
            return {"found": False, "info": None}
        return {"found": True, "info": describe(found, brief=False)}

    def _status(self, arguments: dict[str, Any]) -> dict[str, Any]:
        asked = _read(_Status, arguments)
        machines = [
            machine
            for machine in self._machines.all()
            if (not asked.ids or machine.id in asked.ids) and _matches(machine, asked.keyword)
        ]
        first = (asked.page - 1) * asked.page_size
        shown = machines[first : first + asked.page_size] if asked.page and asked.page_size else machines
        return {
            "vms": [describe(machine, brief=asked.brief) for machine in shown],
            "port_mapping_enabled": True,
            "total": len(machines),
        }

    def _list_images(self) -> dict[str, Any]:
        shown = [
            {
                "name": image.name,
                "description": json.dumps(
                    image.description() | {"guest_ports": list(self._machines.guest_ports)}
                ),
                "version": VERSION,
                "is_dev": True,
            }
            for image in self._machines.images
        ]
        return {"images": shown}


def _meta() -> dict[str, Any]:
    return {
        "kms": {"url": "", "urls": []},
        "gateway": {"url": "", "base_domain": "", "port": 0, "agent_port": 0, "urls": []},
        "resources": {
            "max_cvm_number": MOST_VMS,
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
        "uptime": elapsed(0 if machine.began is None else now - machine.began),
        "app_url": None,
        "app_id": machine.app_id,
        "instance_id": machine.instance_id,
        "configuration": None if brief else configuration,
        "exited_at": "never" if machine.ended is None else elapsed(now - machine.ended),
        "boot_progress": machine.boot_progress,
        "boot_error": machine.boot_error,
        "shutdown_progress": machine.shutdown_progress,
        "image_version": VERSION,
        "events": list(machine.events),
        "interfaces": [_LO],
    }


def _read(kind: type[_Message], arguments: dict[str, Any]) -> _Message:
    try:
        return kind.model_validate(arguments)
    except ValidationError as error:
        fault = error.errors()[0]
        raise VmmError(
            f"Failed to decode request: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        ) from error


def _matches(machine: Machine, keyword: str) -> bool:
    names = (machine.configuration.name, machine.id, machine.app_id, machine.configuration.image)
    return any(keyword in name for name in names)


def elapsed(seconds: float) -> str:
    """As dstack shows durations: `1day 2h 3m 4s`, without the zeros."""
    left, parts = max(0, int(seconds)), []
    for size, unit in ((86400, "day"), (3600, "h"), (60, "m"), (1, "s")):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count}{unit}s" if unit == "day" and count > 1 else f"{count}{unit}")
    return " ".join(parts) or "0s"
