"""A fleet over a VMM in memory, guests of the real protocol on loopback, and the real store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from no_values import NoValues
from ports import free_range

from platform_protocol.canonical import sha256_hex
from platform_protocol.ids import ChallengeId, ClaimId, Hotkey
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.clock import SystemClock
from platform_validator.cvm.connection import SessionPace
from platform_validator.cvm.fleet import Cvm, Fleet, FleetRules
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import Hosts, VmmHost
from platform_validator.cvm.memory import IMAGE, MemoryVmm
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.probe import HttpProbe
from platform_validator.cvm.quota import Limits, Quota, Refusal, Reservation
from platform_validator.cvm.testing_guest import GuestScript
from platform_validator.cvm.vmm import VmSpec
from platform_validator.egress.gate import EgressGate
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.keyring import Keyring
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import Purpose, StateIdentity
from platform_validator.store.sqlite import SqliteStore

RESOURCES = Resources(cpu_cores=1, memory_mb=256, disk_mb=512)
LIMITS = Limits(Resources(cpu_cores=4, memory_mb=2048, disk_mb=10240), max_cvms=16)
COMPOSE = b'{"name":"digits"}'
BUNDLE = "b" * 64
PLAN = CvmPlan(
    challenge_id=ChallengeId("00000000-0000-4000-8000-000000000001"),
    instance_key="digits@1",
    commit="c" * 40,
    image=IMAGE,
    compose=COMPOSE,
    compose_hash=sha256_hex(COMPOSE),
    bundle_sha256=BUNDLE,
    resources=RESOURCES,
    timeout=timedelta(minutes=5),
    env={"TOKEN": "operator-secret"},
)
QUICK = SessionPace(dial=2, handshake=2, send=2, resume_for=0.3, retry=0.01, retry_most=0.02)
WRITES = ("intend_vm", "vm_created", "vm_phase", "vm_attested")


class QuickClock(SystemClock):
    """The system's clocks; sleeping is shortened, and the wall clock can be put forward."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self) -> datetime:
        return super().now() + self.ahead

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))


class FailingStore:
    """The real store, of which named methods say StoreUnavailable, and calls are noted in order."""

    def __init__(self, store: SqliteStore, journal: list[str]) -> None:
        self._store = store
        self._journal = journal
        self.broken: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            if name in self.broken:
                raise StoreUnavailable("the disk is full")
            if name in WRITES:
                phase = f":{arguments[1].value}" if name == "vm_phase" else ""
                self._journal.append(name + phase)
            return await method(*arguments, **named)

        return call


@dataclass
class World:
    """A fleet and all that it stands on."""

    fleet: Fleet
    vmm: MemoryVmm
    store: Any
    quota: Quota
    clock: QuickClock
    script: GuestScript
    journal: list[str]
    specs: list[VmSpec]
    stages: list[str] = field(default_factory=list)

    def reserve(self) -> Reservation:
        reservation = self.quota.reserve(RESOURCES, "test")
        assert not isinstance(reservation, Refusal)
        return reservation

    async def boot(self, plan: CvmPlan = PLAN, purpose: Purpose = Purpose.JOB) -> Cvm:
        return await self.fleet.boot(
            plan,
            purpose=purpose,
            reservation=self.reserve(),
            claim_id=ClaimId("claim-1") if purpose is Purpose.JOB else None,
            on_stage=self.stages.append,
        )

    async def nothing_is_left(self) -> None:
        """Every VM gone, every reservation back, every record closed."""
        async with asyncio.timeout(10):
            await self.fleet.destroyer.finish()
        assert self.vmm.machines() == []
        assert self.quota.view().cvms == 0
        assert await self.store.open_vms() == []
        assert self.fleet.views() == []


MakeWorld = Callable[..., Awaitable[World]]


def the_host(vmm: MemoryVmm, clock: QuickClock, ports: tuple[int, int]) -> Hosts:
    """The only one."""
    return Hosts(
        [VmmHost(DEFAULT_HOST, vmm, HttpProbe(vmm=vmm, clock=clock), HostPorts(*ports))], clock=clock
    )


@asynccontextmanager
async def fleet_worlds(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    """Makes worlds that end with it."""
    async with contextlib.AsyncExitStack() as stack:
        opened = itertools.count()

        async def make(*, ports: int = 8, egress: EgressGate | None = None, **rules: Any) -> World:
            journal: list[str] = []
            specs: list[VmSpec] = []
            script, clock = GuestScript(), QuickClock()

            def boots(spec: VmSpec) -> GuestScript:
                journal.append("guest")
                specs.append(spec)
                return script

            vmm = await stack.enter_async_context(MemoryVmm(script=boots))
            real = await SqliteStore.open(tmp_path / f"{next(opened)}.db")
            stack.push_async_callback(real.close)
            store: Any = FailingStore(real, journal)
            quota = Quota(LIMITS)
            settings: dict[str, Any] = {
                "level": IsolationLevel.CONTAINER,
                "allow_simulated": False,
                "pace": QUICK,
            } | rules
            fleet = Fleet(
                hosts=the_host(vmm, clock, free_range(ports)),
                store=store,
                keyring=Keyring(b"k" * 32),
                quota=quota,
                policy=AttestationPolicy(
                    level=settings["level"], allow_simulated=settings["allow_simulated"], checker=None
                ),
                values=NoValues(),
                clock=clock,
                identity=StateIdentity("0123456789", "instance"),
                validator=Hotkey("5DD"),
                rules=FleetRules(base_url="http://10.0.2.2:18080", **settings),
                egress=egress,
            )
            group = await stack.enter_async_context(asyncio.TaskGroup())
            running = group.create_task(fleet.run())
            stack.callback(running.cancel)
            await asyncio.sleep(0)  # the turn in which the fleet begins
            return World(fleet, vmm, store, quota, clock, script, journal, specs)

        yield make


async def caught(world: World, booting: asyncio.Event) -> Cvm | Exception:
    """A boot that tells when it has come to `booting`, and returns what it raised."""
    try:
        return await world.fleet.boot(
            PLAN,
            purpose=Purpose.JOB,
            reservation=world.reserve(),
            claim_id=ClaimId("claim-1"),
            on_stage=lambda stage: booting.set() if stage == "booting" else None,
        )
    except Exception as error:  # noqa: BLE001 - handed to the test
        return error


def restarted(world: World, quota: Quota, egress: EgressGate | None = None) -> Fleet:
    """The fleet of a process that starts on the same journal."""
    return Fleet(
        hosts=the_host(world.vmm, world.clock, free_range(4)),
        store=world.store,
        keyring=Keyring(b"k" * 32),
        quota=quota,
        policy=AttestationPolicy(level=IsolationLevel.CONTAINER, allow_simulated=False, checker=None),
        values=NoValues(),
        clock=world.clock,
        identity=StateIdentity("0123456789", "instance"),
        validator=Hotkey("5DD"),
        rules=FleetRules(
            IsolationLevel.CONTAINER, allow_simulated=False, base_url="http://10.0.2.2", pace=QUICK
        ),
        egress=egress,
    )
