"""What a conformance check works with: a VMM by its wire, and stopped VMs that are removed afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

from platform_protocol.compose import app_compose
from platform_protocol.ids import VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.spec import parse_platform_toml
from platform_protocol.user_config import UserConfig
from platform_validator.cvm.dstack.capabilities import Capabilities, capabilities
from platform_validator.cvm.dstack.client import DstackVmm
from platform_validator.cvm.dstack.wire import OK, REFUSED, Wire
from platform_validator.cvm.vmm import VmmClient, VmmImage, VmSpec

PREFIX = "conformance-"
_POLL = 0.05
_TOML = b'name = "conformance"\nversion = "1"\nentry = "challenge"\n'
_NO_RUNTIME = "platform-runtime@sha256:" + "0" * 64
_PORTS = 200
_GUEST_PORT = 10000


class Deviation(AssertionError):
    """The VMM does something else than is documented for its version."""


class Skipped(Exception):
    """The check cannot be made here; why."""


class Reply(NamedTuple):
    """`value` is the answer's JSON; None for Empty, in either form."""

    status: int
    value: Any

    @property
    def fields(self) -> dict[str, Any]:
        """Those of an answer that is an object. Raises Deviation for another, and for a refusal."""
        require(self.status == OK, f"expected 200, got {self.status}: {str(self.value)[:200]}")
        require(isinstance(self.value, dict), f"expected an object, got {str(self.value)[:80]}")
        found: dict[str, Any] = self.value
        return found


@dataclass
class Bench:
    """One VMM under judgement; also the harness of the port's own cases.

    Attributes:
        wire: To it, with credentials.
        anonymous: To it, without.
        client: The validator's client of it.
        can: What its version is documented to do.
        image: The image of which VMs are made.
        start: Whether VMs may be started.
        credentials: Whether `wire` has any.
        first_port: VMs get host ports from here on.
        patience: Seconds within which a VM must start, stop or go.
    """

    wire: Wire
    anonymous: Wire
    client: VmmClient
    can: Capabilities
    image: VmmImage
    start: bool
    credentials: bool
    first_port: int = 19_000
    patience: float = 20.0
    made: set[str] = field(default_factory=set)
    _ports: int = 0

    @property
    def has_tee(self) -> bool:
        """For the port's cases."""
        return self.image.level is IsolationLevel.TEE

    def spec(self, name: VmName) -> VmSpec:
        """For the port's cases: the smallest VM."""
        self.made.add(name)
        return VmSpec(
            name=name,
            image=self.image.name,
            compose=self.compose().encode(),
            user_config=user_config(name),
            resources=Resources(cpu_cores=1, memory_mb=256, disk_mb=1024),
            host_port=self.port(),
            guest_port=_GUEST_PORT,
            tee=self.has_tee,
            simulated_tee=False,
        )

    def port(self) -> int:
        """A host port that no other VM of this run has just now."""
        self._ports = (self._ports + 1) % _PORTS
        return self.first_port + self._ports

    def compose(self) -> str:
        """app-compose.json that this VMM takes."""
        digest = self.image.runtimes.get("platform-runtime")
        runtime = f"platform-runtime@{digest}" if digest else _NO_RUNTIME
        return app_compose(parse_platform_toml(_TOML), bundle_sha256="a" * 64, runtime=runtime).decode()

    def configuration(self, **change: Any) -> dict[str, Any]:
        """A VmConfiguration of a VM that is not started, unless starting is allowed and asked for."""
        name = change.get("name", f"{PREFIX}{uuid4()}")
        if isinstance(name, str):
            self.made.add(name)
        message: dict[str, Any] = {
            "name": name,
            "image": self.image.name,
            "compose_file": self.compose(),
            "vcpu": 1,
            "memory": 256,
            "disk_size": 1,
            "user_config": user_config(VmName(str(name))),
            "stopped": True,
        }
        if self.can.no_tee:
            message["no_tee"] = not self.has_tee
        return message | change

    def needs_vm(self) -> None:
        """Before anything that makes, or may make, a VM.

        Raises:
            Skipped: It would be started, and that is not allowed.
        """
        if not self.can.stopped and not self.start:
            raise Skipped(f"version {self.can.version} starts every VM that it makes: --start allows it")

    async def call(self, method: str, message: Mapping[str, Any] | bytes) -> Reply:
        """A method's status and answer.

        Raises:
            Deviation: A status or a body that no version gives.
            VmmError: No answer at all.
        """
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        answer = await self.wire.exchange("POST", f"/prpc/{method}?json", body, limit=60)
        try:
            value = json.loads(answer.body) if answer.body.strip() else None
        except ValueError as error:
            raise Deviation(f"{method}: HTTP {answer.status} with a body that is not JSON") from error
        return Reply(answer.status, value)

    async def refuses(self, method: str, message: Mapping[str, Any] | bytes) -> str:
        """The text of a refusal: 400 and `{"error"}`. Raises Deviation for anything else."""
        status, value = await self.call(method, message)
        require(status == REFUSED, f"{method}: expected {REFUSED}, got {status}")
        text = value.get("error") if isinstance(value, dict) else None
        require(isinstance(text, str) and bool(text), f"{method}: a 400 without a text in `error`")
        return str(text)

    async def refuses_vm(self, **change: Any) -> str:
        """CreateVm is refused, and nothing is made. Raises Deviation otherwise."""
        self.needs_vm()
        message = self.configuration(**change)
        text = await self.refuses("CreateVm", message)
        found = (await self.call("Status", {"keyword": PREFIX})).fields["vms"]
        require(
            all(vm["name"] != message["name"] for vm in found),
            "CreateVm was refused, and made a VM all the same",
        )
        return text

    @contextlib.asynccontextmanager
    async def vm(self, **change: Any) -> AsyncIterator[dict[str, Any]]:
        """A VM, not started, for the time of the block: its VmInfo."""
        self.needs_vm()
        vm_id = await self.make(**change)
        try:
            yield await self.info(vm_id)
        finally:
            await self.destroy(vm_id)

    async def make(self, **change: Any) -> str:
        """CreateVm's id."""
        made = (await self.call("CreateVm", self.configuration(**change))).fields
        require(isinstance(made.get("id"), str) and bool(made["id"]), "CreateVm: an answer without an id")
        return str(made["id"])

    async def info(self, vm_id: str) -> dict[str, Any]:
        """GetInfo of a VM that is there."""
        found = (await self.call("GetInfo", {"id": vm_id})).fields
        require(found.get("found") is True, f"GetInfo does not find {vm_id}")
        info: dict[str, Any] = found["info"]
        return info

    async def until(self, vm_id: str, *states: str) -> None:
        """Wait for one of the states; none: until it is gone. Raises Deviation when patience ends."""
        deadline = time.monotonic() + self.patience
        while True:
            found = (await self.call("GetInfo", {"id": vm_id})).fields
            status = found["info"]["status"] if found.get("found") else None
            if status in states or (not states and status is None):
                return
            wanted = " or ".join(states) or "gone"
            require(
                time.monotonic() < deadline, f"expected {wanted} within {self.patience:.0f} s, it is {status}"
            )
            await asyncio.sleep(_POLL)

    async def destroy(self, vm_id: str) -> None:
        """Stop, wait, remove, wait: right for every version."""
        if (await self.call("StopVm", {"id": vm_id})).status != OK:
            return
        await self.until_ended(vm_id)
        await self.call("RemoveVm", {"id": vm_id})
        await self.until(vm_id)

    async def until_ended(self, vm_id: str) -> None:
        """Wait until nothing of it runs; one that is gone has ended too."""
        found = (await self.call("GetInfo", {"id": vm_id})).fields
        if found.get("found"):
            await self.until(vm_id, "stopped", "exited", "removing")

    async def sweep(self) -> list[str]:
        """Destroy what this run made and what is still there; names of what stays."""
        found = (await self.call("Status", {"keyword": PREFIX})).fields["vms"]
        for vm in found:
            if vm["name"] in self.made:
                await self.destroy(str(vm["id"]))
        left = (await self.call("Status", {"keyword": PREFIX})).fields["vms"]
        return [str(vm["name"]) for vm in left if vm["name"] in self.made]


@contextlib.asynccontextmanager
async def bench_of(
    url: str,
    *,
    image: str,
    start: bool,
    token: str | None = None,
    user: str | None = None,
    password: str | None = None,
    first_port: int = 19_000,
) -> AsyncIterator[Bench]:
    """A bench for the VMM at a URL; when it is left, nothing that it made is left.

    Args:
        url: http, https or `unix:`.
        image: Of which VMs are made.
        start: Whether VMs may be started.
        token: See DstackVmm.
        user: See DstackVmm.
        password: See DstackVmm.
        first_port: The first of 200 host ports for VMs.

    Raises:
        VmmError: It does not answer.
        Deviation: It has no such image.
    """
    wire, anonymous = Wire(url, token=token, user=user, password=password), Wire(url)
    client = DstackVmm(url, token=token, user=user, password=password)
    try:
        facts = await client.facts()
        known = {one.name: one for one in facts.images}
        require(image in known, f"no image {image!r}; it has {', '.join(sorted(known)) or 'none'}")
        can = capabilities(facts.version)
        has = token is not None or user is not None
        bench = Bench(wire, anonymous, client, can, known[image], start, has, first_port)
        try:
            yield bench
        finally:
            left = await bench.sweep()
            require(not left, f"VMs of this run could not be removed: {', '.join(left)}")
    finally:
        await client.close()
        await anonymous.close()
        await wire.close()


def user_config(name: VmName) -> str:
    """As a guest of ours reads it; nobody waits for this one."""
    return UserConfig(
        vm=name,
        launch_secret=UserConfig.encode_secret(bytes(32)),
        validator_base_url="http://10.0.2.2:1",
        proxy_url=None,
        max_lifetime_s=60,
        hard_lifetime_s=60,
    ).model_dump_json()


def require(holds: bool, found: str) -> None:
    """Or a Deviation."""
    if not holds:
        raise Deviation(found)
