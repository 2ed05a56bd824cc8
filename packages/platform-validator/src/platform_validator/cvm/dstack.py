"""The VMM port over dstack's pRPC: tolerant of every version from v0.5.2 to the head of August 2026.

Facts that shape it: errors are 400 with `{"error"}` in two text forms; Empty answers are `null` or no body;
RemoveVm became asynchronous in v0.5.7; versions before v0.5.6 ignore `no_tee` silently and start a TDX VM.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import aiohttp

from platform_protocol.ids import VmId, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_validator.cvm.vmm import (
    Vm,
    VmmAtCapacity,
    VmmFacts,
    VmmImage,
    VmmRefused,
    VmmUnauthorized,
    VmmUnavailable,
    VmNotFound,
    VmSpec,
    VmState,
)

_CALL = 15.0
_CREATE = 60.0
_MAX_ANSWER = 32 * 1024 * 1024
_MAX_LOGS = 2 * 1024 * 1024
_NO_TEE_SINCE = (0, 5, 6)
_CAPACITY = (
    "no cid available",
    "cid pool",
    "not enough",
    "insufficient",
    "out of memory",
    "cannot allocate memory",
    "no space left",
    "gpu is not available",
    "gpu is in use",
    "device or resource busy",
)
_MISSING = ("vm not found", "failed to remove vm directory", "no such vm")
_ERROR_LINES = 5
_OK, _REFUSED, _NOT_FOUND = 200, 400, 404
_UNAUTHORIZED = (401, 403)


class DstackVmm:
    """A dstack VMM at an http, https or `unix:` URL.

    Args:
        url: Where it listens.
        token: Sent as Bearer and as X-Admin-Token.
        user: For Basic authentication, with `password`, where there is no token.
        password: See `user`.
        port_address: The host under which mapped guest ports are reached.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        user: str | None = None,
        password: str | None = None,
        port_address: str = "127.0.0.1",
    ) -> None:
        self._socket = url.removeprefix("unix:") if url.startswith("unix:") else None
        self._base = "http://vmm" if self._socket else url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers |= {"X-Admin-Token": token, "Authorization": f"Bearer {token}"}
        elif user is not None:
            pair = base64.b64encode(f"{user}:{password or ''}".encode()).decode("ascii")
            self._headers["Authorization"] = f"Basic {pair}"
        self._address = port_address
        self._client: aiohttp.ClientSession | None = None
        self._version: str | None = None

    async def facts(self) -> VmmFacts:
        """Version and images. An image without our description is dstack's own: a TDX image."""
        version = str((await self._call("Version", {})).get("version", ""))
        self._version = version
        listed = (await self._call("ListImages", {})).get("images") or []
        return VmmFacts(version, tuple(_image(image) for image in listed if isinstance(image, dict)))

    async def create(self, spec: VmSpec) -> VmId:
        """CreateVm. With `tee=False` the version is looked at first."""
        if not spec.tee:
            await self._require_no_tee()
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
                    "host_port": spec.host_port,
                    "vm_port": spec.guest_port,
                    "host_address": "127.0.0.1" if self._address in ("127.0.0.1", "localhost") else "",
                }
            ],
            "user_config": spec.user_config,
            "no_tee": not spec.tee,
        }
        if spec.simulated_tee and not spec.tee:
            message["simulated_tee"] = "dstack-tdx"
        if spec.gpus:
            message["gpus"] = {"attach_mode": "listed", "gpus": [{"slot": slot} for slot in spec.gpus]}
        answer = await self._call("CreateVm", message, timeout=_CREATE)
        if not isinstance(answer.get("id"), str) or not answer["id"]:
            raise VmmUnavailable(f"CreateVm of {spec.name} was answered without an id: look for its name")
        return VmId(answer["id"])

    async def list(self, prefix: str = "") -> Sequence[Vm]:
        """Status, by name."""
        answer = await self._call("Status", {"keyword": prefix} if prefix else {})
        vms = [self._vm(vm) for vm in answer.get("vms") or [] if isinstance(vm, dict)]
        return [vm for vm in vms if vm.name.startswith(prefix)]

    async def get(self, vm_id: VmId) -> Vm | None:
        """GetInfo."""
        answer = await self._call("GetInfo", {"id": vm_id})
        info = answer.get("info")
        return self._vm(info) if answer.get("found") and isinstance(info, dict) else None

    async def stop(self, vm_id: VmId) -> None:
        """StopVm."""
        await self._call("StopVm", {"id": vm_id})

    async def remove(self, vm_id: VmId) -> None:
        """RemoveVm."""
        await self._call("RemoveVm", {"id": vm_id})

    async def logs(self, vm_id: VmId, lines: int) -> str:
        """The serial console, then what its process said last (QEMU's own errors are only there)."""
        serial = await self._channel(vm_id, lines, "serial")
        errors = await self._channel(vm_id, _ERROR_LINES, "stderr")
        return f"{serial}\n{errors}".strip()

    async def collateral(self, path: str) -> tuple[bytes, Mapping[str, str]]:
        """GET below `/pccs` (a local VMM's own collateral): body and headers.

        Raises:
            VmmUnavailable: No answer, or not 200.
        """
        status, body, headers = await self._exchange("GET", f"/pccs{path}", None, _CALL, _MAX_ANSWER)
        if status != _OK:
            raise VmmUnavailable(f"GET /pccs{path}: HTTP {status}")
        return body, headers

    async def close(self) -> None:
        """Close connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _channel(self, vm_id: VmId, lines: int, channel: str) -> str:
        path = f"/logs?id={quote(vm_id)}&follow=false&ansi=false&lines={lines}&ch={channel}"
        status, body = await self._request("GET", path, None, _CALL, _MAX_LOGS)
        if status == _NOT_FOUND:
            raise VmNotFound(f"the VMM has no VM {vm_id}")
        return body.decode("utf-8", "replace") if status == _OK else ""

    async def _require_no_tee(self) -> None:
        if self._version is None:
            self._version = str((await self._call("Version", {})).get("version", ""))
        found = re.search(r"(\d+)\.(\d+)\.(\d+)", self._version)
        if found is None or tuple(int(part) for part in found.groups()) < _NO_TEE_SINCE:
            raise VmmRefused(
                f"VMM version {self._version or 'unknown'} ignores no_tee and would start a TDX VM: "
                "levels below Tee need dstack v0.5.6 or newer"
            )

    async def _call(self, method: str, message: Mapping[str, Any], timeout: float = _CALL) -> dict[str, Any]:
        body = json.dumps(message).encode()
        status, data = await self._request("POST", f"/prpc/{method}?json", body, timeout, _MAX_ANSWER)
        if status not in (_OK, _REFUSED):
            raise VmmUnavailable(f"{method}: expected HTTP 200 or 400, got {status}: is this a VMM?")
        if status == _OK and not data.strip():
            return {}
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise VmmUnavailable(
                f"{method}: HTTP {status}, and the answer is not JSON: is this a VMM?"
            ) from error
        if status == _OK:
            return value if isinstance(value, dict) else {}
        text = str(value.get("error", "")) if isinstance(value, dict) else ""
        raise refusal(method, text)

    async def _request(
        self, verb: str, path: str, body: bytes | None, timeout: float, most: int
    ) -> tuple[int, bytes]:
        status, data, _ = await self._exchange(verb, path, body, timeout, most)
        return status, data

    async def _exchange(
        self, verb: str, path: str, body: bytes | None, timeout: float, most: int
    ) -> tuple[int, bytes, Mapping[str, str]]:
        try:
            async with self._session().request(
                verb,
                self._base + path,
                data=body,
                headers=self._headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout),
            ) as response:
                data = await response.content.read(most + 1)
                while len(data) <= most and (more := await response.content.read(most + 1 - len(data))):
                    data += more
                status, headers = response.status, response.headers
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            where = self._socket or self._base
            raise VmmUnavailable(
                f"no answer from the VMM at {where}: {str(error) or type(error).__name__}"
            ) from error
        if len(data) > most:
            raise VmmUnavailable(f"{path}: the VMM's answer is over {most} bytes")
        if status in _UNAUTHORIZED:
            raise VmmUnauthorized(
                f"the VMM answered {status}: set DSTACK_VMM_TOKEN, or DSTACK_VMM_AUTH_USER and _PASSWORD"
            )
        return status, data, headers

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            connector = (
                aiohttp.UnixConnector(self._socket) if self._socket else aiohttp.TCPConnector(limit=64)
            )
            self._client = aiohttp.ClientSession(connector=connector)
        return self._client

    def _vm(self, info: Mapping[str, Any]) -> Vm:
        configuration = info.get("configuration") or {}
        ports = configuration.get("ports") or []
        port = ports[0].get("host_port") if ports and isinstance(ports[0], dict) else None
        return Vm(
            id=VmId(str(info.get("id", ""))),
            name=VmName(str(info.get("name", ""))),
            state=_state(str(info.get("status", ""))),
            boot_progress=str(info.get("boot_progress") or "")[:256],
            boot_error=str(info.get("boot_error") or "")[:4096],
            instance=info.get("instance_id") or None,
            address=(self._address, port) if isinstance(port, int) and port else None,
            resources=Resources(
                cpu_cores=_number(configuration.get("vcpu")),
                memory_mb=_number(configuration.get("memory")),
                disk_mb=_number(configuration.get("disk_size")) * 1024,
                gpu_count=len((configuration.get("gpus") or {}).get("gpus") or []),
            ),
        )


def refusal(method: str, text: str) -> VmmRefused:
    """The error for a 400's text. Texts differ between versions, so only substrings are looked at."""
    lowered = text.lower()
    message = f"{method}: {text[:1000] or 'refused without a reason'}"
    if any(word in lowered for word in _MISSING):
        return VmNotFound(message)
    if any(word in lowered for word in _CAPACITY):
        return VmmAtCapacity(message)
    return VmmRefused(message)


def _image(image: Mapping[str, Any]) -> VmmImage:
    name = str(image.get("name", ""))
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
    runtimes = described.get("runtimes")
    table = {str(key): str(value) for key, value in runtimes.items()} if isinstance(runtimes, dict) else {}
    return VmmImage(name, level, table, local=True)


def _state(word: str) -> VmState:
    try:
        return VmState(word)
    except ValueError:
        return VmState.UNKNOWN


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
