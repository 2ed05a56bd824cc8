"""A fleet whose VMM is the double: the real client, journal, probe and sessions; guests on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from no_values import NoValues
from ports import free_range
from tests.dstack_double import DstackDouble
from tests.dstack_double.server import IMAGE

from platform_protocol.canonical import sha256_hex
from platform_protocol.ids import ChallengeId, ClaimId, Hotkey
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.user_config import UserConfig
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.clock import SystemClock
from platform_validator.cvm.connection import SessionPace
from platform_validator.cvm.dstack import DstackVmm
from platform_validator.cvm.fleet import Cvm, Fleet, FleetRules
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import Hosts, VmmHost
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.probe import HttpProbe
from platform_validator.cvm.quota import Limits, Quota, Reservation
from platform_validator.cvm.testing_guest import GuestScript, ScriptedGuest
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.keyring import Keyring
from platform_validator.store.records import Purpose, StateIdentity
from platform_validator.store.sqlite import SqliteStore

STATE_ID = "0123456789"
COMPOSE = b'{"manifest_version":2,"name":"digits","runner":"docker-compose"}'
RESOURCES = Resources(cpu_cores=1, memory_mb=256, disk_mb=1024)
PLAN = CvmPlan(
    challenge_id=ChallengeId("00000000-0000-4000-8000-000000000001"),
    instance_key="digits@1",
    commit="c" * 40,
    image=IMAGE,
    compose=COMPOSE,
    compose_hash=sha256_hex(COMPOSE),
    bundle_sha256="b" * 64,
    resources=RESOURCES,
    timeout=timedelta(minutes=5),
)
_LIMITS = Limits(Resources(cpu_cores=8, memory_mb=4096, disk_mb=20480, gpu_count=4), max_cvms=8)
_QUICK = SessionPace(dial=2, handshake=5, send=2, resume_for=0.5, retry=0.01, retry_most=0.02)
_PORTS = 8, (10_000, 19_900)
"""How many, of the double's range."""
PATIENCE = 30
VERSIONS = ("0.5.6", "0.5.7", "0.6.0")
"""Levels below Tee need v0.5.6, which still removes at once; v0.5.7 no more; the head refuses taken ports."""


class HastyClock(SystemClock):
    """The system's; pauses are cut short."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.02))


@dataclass
class House:
    """All of it. `guests`: off, and the SDK in a VM that runs never answers."""

    double: DstackDouble
    fleet: Fleet
    store: SqliteStore
    quota: Quota
    socket: Path
    serves: bool = True
    stages: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _serving: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def boot(self, plan: CvmPlan = PLAN) -> Cvm:
        """A job's CVM."""
        reservation = self.quota.reserve(plan.resources, f"job-{next(self._numbers)}")
        assert isinstance(reservation, Reservation)
        return await self.fleet.boot(
            plan,
            purpose=Purpose.JOB,
            reservation=reservation,
            claim_id=ClaimId("claim-1"),
            on_stage=self.stages.append,
        )

    def names(self) -> list[str]:
        """Of the VMs that there really are."""
        return [str(one.configuration["name"]) for one in self.double.host.machines.values()]

    def create(self, **fields: Any) -> str:
        """Somebody else makes a VM: its id."""
        message = {"name": "other", "image": IMAGE, "compose_file": COMPOSE.decode(), **fields}
        vm_id: str = self.double.rpc.call("CreateVm", message)["id"]
        return vm_id

    async def up(self) -> None:
        """The VMM listens."""
        await self._serving.enter_async_context(self.double.listening(self.socket))

    async def down(self) -> None:
        """Its process ends; VMs run on."""
        await self._serving.aclose()

    async def settled(self) -> None:
        """Every CVM is gone, every reservation is back, and every record closed."""
        async with asyncio.timeout(PATIENCE):
            await self.fleet.destroyer.finish()
        assert self.quota.view().cvms == 0
        assert await self.store.open_vms() == []
        assert self.fleet.views() == []

    async def nothing_is_left(self) -> None:
        """And the VMM has none either."""
        await self.settled()
        assert self.names() == []

    async def follow(self) -> None:
        """Serve an SDK for as long as its VM runs."""
        guests: dict[tuple[str, int], asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                self.double.host.advance()
                running = {
                    (machine.id, machine.boots): machine.configuration
                    for machine in self.double.host.machines.values()
                    if machine.running and machine.configuration["user_config"]
                }
                for key in guests.keys() - running.keys():
                    guests.pop(key).cancel()
                for key, configuration in running.items():
                    if key not in guests and self.serves:
                        guests[key] = tasks.create_task(_guest(configuration))
                await asyncio.sleep(0.01)


async def _guest(configuration: dict[str, Any]) -> None:
    config = UserConfig.model_validate_json(configuration["user_config"])
    # A second VM of that port has none: QEMU could not bind it either.
    with contextlib.suppress(OSError):
        await ScriptedGuest(config, GuestScript()).serve("127.0.0.1", configuration["ports"][0]["host_port"])


@contextlib.asynccontextmanager
async def house(folder: Path, version: str, **rules: Any) -> AsyncIterator[House]:
    """A house with the double as that version. Levels below Tee need v0.5.6."""
    double = DstackDouble(version)
    path, clock = folder / "vmm.sock", HastyClock()
    vmm = DstackVmm(f"unix:{path}")
    store = await SqliteStore.open(folder / "journal.db")
    quota = Quota(_LIMITS)
    only = VmmHost(
        DEFAULT_HOST,
        vmm,
        HttpProbe(vmm=vmm, clock=clock),
        HostPorts(*free_range(*_PORTS)),
    )
    fleet = Fleet(
        hosts=Hosts([only], clock=clock),
        store=store,
        keyring=Keyring(b"k" * 32),
        quota=quota,
        policy=AttestationPolicy(level=IsolationLevel.VM, allow_simulated=False, checker=None),
        values=NoValues(),
        clock=clock,
        identity=StateIdentity(STATE_ID, "instance"),
        validator=Hotkey("5DD"),
        rules=FleetRules(
            base_url="http://10.0.2.2:18080",
            level=IsolationLevel.VM,
            allow_simulated=False,
            **({"pace": _QUICK} | rules),
        ),
    )
    made = House(double, fleet, store, quota, path)
    try:
        await made.up()
        async with asyncio.TaskGroup() as tasks:
            background = [tasks.create_task(fleet.run()), tasks.create_task(made.follow())]
            await asyncio.sleep(0)  # the turn in which the fleet begins
            try:
                yield made
            finally:
                for task in background:
                    task.cancel()
    finally:
        await made.down()
        await vmm.close()
        await store.close()


MakeHouse = Callable[..., contextlib.AbstractAsyncContextManager[House]]
