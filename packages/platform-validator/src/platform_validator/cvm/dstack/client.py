"""The VMM port over dstack's pRPC.

Facts that shape it: RemoveVm became asynchronous in v0.5.7; versions before v0.5.6 ignore `no_tee` silently
and start a TDX VM; conflicts over ports and GPUs show, if at all, when the VM's process dies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from platform_protocol.ids import VmId
from platform_validator.cvm.dstack.answers import objects, read_image, read_vm
from platform_validator.cvm.dstack.arbiter import Arbiter, Claim, Gpu, read_claim
from platform_validator.cvm.dstack.capabilities import Capabilities, capabilities
from platform_validator.cvm.dstack.guest_usage import read_usage
from platform_validator.cvm.dstack.refusals import is_shortage
from platform_validator.cvm.dstack.sealed_env import EnvKey, app_id_of, require_allowed, seal
from platform_validator.cvm.dstack.wire import NOT_FOUND, OK, Wire
from platform_validator.cvm.usage import VmUsage
from platform_validator.cvm.vmm import (
    Vm,
    VmmFacts,
    VmmRefused,
    VmmUnauthorized,
    VmmUnavailable,
    VmNotFound,
    VmSpec,
    VmState,
)

_CREATE = 60.0
_GUEST = 3.0
_MAX_GUEST = 256 * 1024
_MAX_LOGS = 2 * 1024 * 1024
_ERROR_LINES = 5
_SHORT = 1000
_NO_FILE = "os error 2"


class DstackVmm:
    """A dstack VMM at an http, https or `unix:` URL.

    Args:
        url: Where it listens.
        token: Sent as Bearer and as X-Admin-Token.
        user: For Basic authentication, with `password`, where there is no token.
        password: See `user`.
        port_address: The host under which mapped guest ports are reached.
        kms_signer: The KMS's public key (compressed secp256k1, hex) that must have signed the key to which a
            sealed environment is encrypted; without it none is sent.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        user: str | None = None,
        password: str | None = None,
        port_address: str = "127.0.0.1",
        kms_signer: str | None = None,
    ) -> None:
        self._wire = Wire(url, token=token, user=user, password=password)
        self._address = port_address
        self._kms_signer = None if kms_signer is None else bytes.fromhex(kms_signer)
        self._arbiter = Arbiter()

    async def facts(self) -> VmmFacts:
        """Version and images."""
        can = await self._capabilities()
        listed = (await self._wire.call("ListImages", {})).get("images")
        return VmmFacts(
            can.version,
            tuple(read_image(image) for image in objects(listed)),
            tee_only=not can.no_tee,
            simulates=can.simulated_tee,
        )

    async def create(self, spec: VmSpec) -> VmId:
        """CreateVm, after a look at the version, at what other VMs hold, and at the GPUs."""
        _require_able(spec, await self._capabilities())
        environment = await self._sealed(spec) if spec.environment else ""
        claim = await self._claim(spec)
        try:
            answer = await self._wire.call("CreateVm", self._message(spec, claim, environment), limit=_CREATE)
        except (VmmRefused, VmmUnauthorized):
            self._arbiter.settle(spec.name)
            raise
        if not isinstance(answer.get("id"), str) or not answer["id"]:
            raise VmmUnavailable(f"CreateVm of {spec.name} was answered without an id: look for its name")
        self._arbiter.settle(spec.name)
        return VmId(answer["id"])

    async def list(self, prefix: str = "") -> Sequence[Vm]:
        """Status, by name."""
        answer = await self._wire.call("Status", {"keyword": prefix} if prefix else {})
        vms = [read_vm(vm, self._address) for vm in objects(answer.get("vms"))]
        return [vm for vm in vms if vm.name.startswith(prefix)]

    async def get(self, vm_id: VmId) -> Vm | None:
        """GetInfo; of a VM whose process ended by itself also why, if the host lacked something."""
        answer = await self._wire.call("GetInfo", {"id": vm_id})
        info = answer.get("info")
        if not answer.get("found") or not isinstance(info, dict):
            return None
        vm = read_vm(info, self._address)
        return await self._explained(vm) if vm.state is VmState.EXITED else vm

    async def stop(self, vm_id: VmId) -> None:
        """StopVm: also ends dstack's own restarts of it."""
        await self._wire.call("StopVm", {"id": vm_id})

    async def remove(self, vm_id: VmId) -> None:
        """RemoveVm."""
        await self._wire.call("RemoveVm", {"id": vm_id})

    async def logs(self, vm_id: VmId, lines: int) -> str:
        """The serial console, then what its process said last (QEMU's own errors are only there)."""
        serial = await self._channel(vm_id, lines, "serial")
        if len(serial) < _SHORT and _NO_FILE in serial and await self.get(vm_id) is None:
            # Up to v0.5.11 the logs of a VM that is not there are 200, with an error of the file system.
            raise VmNotFound(f"the VMM has no VM {vm_id}")
        errors = await self._channel(vm_id, _ERROR_LINES, "stderr")
        return f"{serial}\n{errors}".strip()

    async def usage(self, vm_id: VmId) -> VmUsage | None:
        """SysInfo and NetworkInfo of its guest agent."""
        system = await self._guest("SysInfo", vm_id)
        if system is None:
            return None
        return read_usage(system, await self._guest("NetworkInfo", vm_id) or {})

    async def collateral(self, path: str) -> tuple[bytes, Mapping[str, str]]:
        """GET below `/pccs` (a local VMM's own collateral): body and headers.

        Raises:
            VmmUnavailable: No answer, or not 200.
        """
        answer = await self._wire.exchange("GET", f"/pccs{path}")
        if answer.status != OK:
            raise VmmUnavailable(f"GET /pccs{path}: HTTP {answer.status}")
        return answer.body, answer.headers

    async def close(self) -> None:
        """Close connections."""
        await self._wire.close()

    async def _capabilities(self) -> Capabilities:
        """Asked each time: between two calls a VMM may have been exchanged for an older one."""
        return capabilities(str((await self._wire.call("Version", {})).get("version") or ""))

    async def _claim(self, spec: VmSpec) -> Claim:
        async with self._arbiter.turn:
            answered = self._arbiter.answered()
            status = await self._wire.call("Status", {})
            shown = objects(status.get("vms"))
            gpus: list[Gpu] = []
            if spec.resources.gpu_count or spec.gpus:
                listed = objects((await self._wire.call("ListGpus", {})).get("gpus"))
                gpus = [Gpu(str(one.get("slot")), one.get("is_free") is True) for one in listed]
            claim = self._arbiter.hold(spec, [read_claim(info) for info in shown], gpus, answered=answered)
        if status.get("port_mapping_enabled") is not False:
            return claim
        if not _has_gateway(spec.compose):
            self._arbiter.settle(spec.name)
            raise VmmRefused(
                "the VMM maps no ports, and this app-compose has no gateway: "
                "enable cvm.port_mapping in vmm.toml"
            )
        return replace(claim, ports=frozenset())

    def _message(self, spec: VmSpec, claim: Claim, environment: str) -> dict[str, Any]:
        message: dict[str, Any] = {
            "name": spec.name,
            "image": spec.image,
            "compose_file": spec.compose.decode(),
            "vcpu": spec.resources.cpu_cores,
            "memory": spec.resources.memory_mb,
            "disk_size": max(1, math.ceil(spec.resources.disk_mb / 1024)),
            "ports": [
                {
                    "protocol": "tcp",
                    "host_port": port,
                    "vm_port": spec.guest_port,
                    "host_address": "127.0.0.1" if self._address in ("127.0.0.1", "localhost") else "",
                }
                for port in claim.ports
            ],
            "user_config": spec.user_config,
            "no_tee": not spec.tee,
        }
        if environment:
            message["encrypted_env"] = environment
        if spec.simulated_tee and not spec.tee:
            message["simulated_tee"] = "dstack-tdx"
        if claim.slots:
            slots = [{"slot": slot} for slot in sorted(claim.slots)]
            message["gpus"] = {"attach_mode": "listed", "gpus": slots}
        return message

    async def _sealed(self, spec: VmSpec) -> str:
        """The environment, encrypted to the key that only this app's VM gets from the KMS, in hex."""
        require_allowed(spec.compose, spec.environment)
        if self._kms_signer is None:
            raise VmmRefused(f"{spec.name}: a sealed environment needs the KMS's signer: none is pinned")
        app_id = app_id_of(spec.compose)
        answer = await self._wire.call("GetAppEnvEncryptPubKey", {"app_id": app_id.hex()})
        return seal(spec.environment, EnvKey.read(answer).checked(app_id, self._kms_signer)).hex()

    async def _guest(self, method: str, vm_id: VmId) -> dict[str, Any] | None:
        """What the guest agent answers; None: there is none, or this VMM does not lead to it."""
        body = json.dumps({"id": vm_id}).encode()
        answer = await self._wire.exchange(
            "POST", f"/guest/{method}?json", body, limit=_GUEST, most=_MAX_GUEST
        )
        try:
            found = json.loads(answer.body) if answer.status == OK else None
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    async def _explained(self, vm: Vm) -> Vm:
        """Looks into what QEMU itself said: never into the console, which is the guest's."""
        try:
            said = await self._channel(vm.id, _ERROR_LINES, "stderr")
        except VmNotFound:
            return vm
        return vm.lacking(said.strip()[-_SHORT:]) if is_shortage(said) else vm

    async def _channel(self, vm_id: VmId, lines: int, channel: str) -> str:
        path = f"/logs?id={quote(vm_id)}&follow=false&ansi=false&lines={lines}&ch={channel}"
        answer = await self._wire.exchange("GET", path, most=_MAX_LOGS)
        if answer.status == NOT_FOUND:
            raise VmNotFound(f"the VMM has no VM {vm_id}")
        return answer.body.decode("utf-8", "replace") if answer.status == OK else ""


def _has_gateway(compose: bytes) -> bool:
    """Whether a gateway leads to VMs of this app-compose."""
    document = json.loads(compose)
    return bool(document.get("gateway_enabled") or document.get("tproxy_enabled"))


def _require_able(spec: VmSpec, can: Capabilities) -> None:
    """Refuse what this version would silently do otherwise."""
    version = can.version or "unknown"
    if not spec.tee and not can.no_tee:
        raise VmmRefused(
            f"VMM version {version} ignores no_tee and would start a TDX VM: "
            "levels below Tee need dstack v0.5.6 or newer"
        )
    if spec.simulated_tee and not spec.tee and not can.simulated_tee:
        raise VmmRefused(
            f"VMM version {version} ignores simulated_tee, so that the VM could show no quote at all: "
            "unset attestation.allow_simulated, or use a dstack newer than v0.5.11"
        )
