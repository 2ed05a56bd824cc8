"""The double's methods: a message in, an answer out, as its version has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.dstack_double import guest, messages
from tests.dstack_double.host import Host, Machine
from tests.dstack_double.messages import Refused

Answer = Callable[[Any], Any]
_IDLE = {"url": "", "urls": []}


class Rpc:
    """Of one host. `env_key` answers GetAppEnvEncryptPubKey; None: no KMS is configured."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.env_key: Callable[[bytes], dict[str, Any]] | None = None
        self._empty: dict[str, Callable[[], Any]] = {
            "Version": lambda: {"version": host.behaviour.version, "rev": "git:0123456789abcdef"},
            "ListImages": self._images,
            "ListGpus": self._gpus,
            "GetMeta": self._meta,
            "ReloadVms": lambda: {"loaded": 0, "updated": 0, "removed": 0},
            "SvList": lambda: {"processes": []},
            "ListRegistryImages": lambda: {"images": []},
        }
        self._methods: dict[str, tuple[messages.Reader, Answer]] = {
            "CreateVm": (self._configuration, lambda asked: {"id": host.create(asked).id}),
            "StartVm": (messages.ID, lambda asked: host.start(asked["id"])),
            "StopVm": (messages.ID, lambda asked: host.stop(asked["id"])),
            "ShutdownVm": (messages.ID, lambda asked: host.shutdown(asked["id"])),
            "RemoveVm": (messages.ID, lambda asked: host.remove(asked["id"])),
            "GetInfo": (messages.ID, self._info),
            "Status": (messages.STATUS, self._status),
            "GetComposeHash": (
                self._configuration,
                lambda asked: {"hash": host.compose_hash(asked["compose_file"])},
            ),
            "UpdateVm": (messages.UPDATE, lambda asked: {"id": host.update(asked)}),
            "UpgradeApp": (messages.UPDATE, lambda asked: {"id": host.update(asked)}),
            "ResizeVm": (messages.UPDATE, self._resize),
            "GetAppEnvEncryptPubKey": (messages.APP, self._env_key),
        }

    def call_guest(self, method: str, body: bytes | dict[str, Any]) -> Any:
        """What a VM's guest agent answers. Raises Refused."""
        self._host.advance()
        return guest.answer(self._host, method, messages.ID("request", _value(body))["id"])

    def call(self, method: str, body: bytes | dict[str, Any]) -> Any:
        """The answer; None for Empty. `body` is JSON, or what a query said. Raises Refused."""
        self._host.advance()
        later = {"UpdateVm", "ReloadVms", "SvList", "ListRegistryImages"}
        known = method not in later or method in self._host.behaviour.methods
        if known and method in self._empty:
            return self._empty[method]()
        if not known or method not in self._methods:
            raise Refused("Failed to handle request", f"Method not found: {method}")
        reader, answer = self._methods[method]
        found = answer(reader("request", _value(body)))
        self._host.advance()
        return found

    def _configuration(self, name: str, value: Any) -> Any:
        return messages.configuration(self._host.behaviour.fields)(name, value)

    def _info(self, asked: dict[str, Any]) -> dict[str, Any]:
        machine = next((one for one in self._host.visible() if one.id == asked["id"]), None)
        return {
            "found": machine is not None,
            "info": self._describe(machine, brief=False) if machine else None,
        }

    def _status(self, asked: dict[str, Any]) -> dict[str, Any]:
        word = asked["keyword"]
        found = [
            machine
            for machine in self._host.visible()
            if (not asked["ids"] or machine.id in asked["ids"])
            and any(
                word in text
                for text in (
                    machine.configuration["name"],
                    machine.id,
                    machine.app_id,
                    machine.configuration["image"],
                )
            )
        ]
        page, size = asked["page"], asked["page_size"]
        shown = found[(page - 1) * size : page * size] if page and size else found
        return {
            "vms": [self._describe(machine, brief=asked["brief"]) for machine in shown],
            "port_mapping_enabled": self._host.port_mapping,
            "total": len(found),
        }

    def _resize(self, asked: dict[str, Any]) -> None:
        sizes = [asked[key] for key in ("vcpu", "memory", "disk_size", "image")]
        if self._host.behaviour.interfaces and not any(sizes):
            raise Refused("Failed to resize VM", "nothing to update")
        self._host.update(asked)

    def _env_key(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self.env_key is None:
            raise Refused("Failed to get app env encrypt pub key", "KMS is not configured")
        answer = self.env_key(bytes.fromhex(asked["app_id"]))
        old = ("public_key", "signature")
        return answer if self._host.behaviour.signs_time else {key: answer[key] for key in old}

    def _images(self) -> dict[str, Any]:
        described = json.dumps({"cmdline": "console=ttyS0", "rootfs_hash": "ab" * 32})
        return {
            "images": [
                {"name": name, "description": described, "version": "0.5.5", "is_dev": False}
                for name in self._host.images
            ]
        }

    def _gpus(self) -> dict[str, Any]:
        slots = self._host.gpus or ()
        listed = [
            {"slot": slot, "product_id": "10de:2335", "description": "3D", "is_free": self._host.free(slot)}
            for slot in slots
        ]
        more = {"allow_attach_all": self._host.attach_all} if self._host.behaviour.attach_all else {}
        return {"gpus": listed, **more}

    def _meta(self) -> dict[str, Any]:
        resources = {"max_cvm_number": 8, "max_allocable_vcpu": 16, "max_allocable_memory_in_mb": 65536}
        if self._host.behaviour.max_disk:
            resources["max_disk_size_in_gb"] = 1024
        found: dict[str, Any] = {
            "kms": dict(_IDLE),
            "gateway": {"url": "", "base_domain": "", "port": 0, "agent_port": 8090, "urls": []},
            "resources": resources,
        }
        if self._host.behaviour.interfaces:
            found["networking"] = {"supported_modes": ["user"], "default_mode": "user", "default_bridge": ""}
        return found

    def _describe(self, machine: Machine, *, brief: bool) -> dict[str, Any]:
        shown = {
            "id": machine.id,
            "name": machine.configuration["name"],
            "status": machine.status,
            "uptime": "never" if machine.began is None else "1m 3s",
            "app_url": self._host.app_url(machine),
            "app_id": machine.app_id,
            "instance_id": self._host.instance(machine),
            "configuration": None if brief else machine.configuration,
            "exited_at": "never" if machine.ended is None else "5s",
            "boot_progress": self._host.progress(machine),
            "boot_error": machine.boot.error,
            "shutdown_progress": "",
            "image_version": "0.5.5",
        }
        if self._host.behaviour.events:
            shown["events"] = machine.events
        if self._host.behaviour.interfaces:
            user = {"mode": "user", "backend": "slirp", "mac": "02:00:00:00:00:01", "bridge_name": None}
            shown["interfaces"] = [user | {"netdev_id": "net0"}]
        return shown


def _value(body: bytes | dict[str, Any]) -> Any:
    try:
        return body if isinstance(body, dict) else json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise Refused("Failed to decode request", str(error)) from error
