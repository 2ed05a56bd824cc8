"""Everything around the engine in memory, on virtual time: outlives the validators that use it."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tests.simulation.virtual import VirtualLoop, Wall

from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmId, VmName
from platform_protocol.platform_messages import ActiveChallenge, IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.session.messages import JobError
from platform_protocol.session.v2 import Offer
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.challenges.source import FetchedTree, Source
from platform_validator.config import Settings, load_settings
from platform_validator.cvm.connection import Callee, Judge, SessionPace
from platform_validator.cvm.errors import SessionLost
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import VmmHost
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.memory import MemoryVmm
from platform_validator.cvm.session import ValuesHandler
from platform_validator.cvm.sessions import Session
from platform_validator.daemon.engine import Drained, Engine
from platform_validator.daemon.parts import Outside, make_components, make_values
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.jobs.lease import LeaseRules, TaskRenewer
from platform_validator.keyring import Keyring
from platform_validator.platform_client.memory import MemoryPlatform
from platform_validator.store.memory import MemoryStore
from platform_validator.store.records import StateIdentity
from platform_validator.telemetry.metrics import Metrics
from platform_validator.values.keys import MemoryKeys

CHALLENGE = ChallengeId("00000000-0000-4000-8000-0000000000c1")
TOML = (
    b'name = "digits"\nversion = "1"\n[cvm]\ncpu_cores = 1\nmemory_mb = 256\ndisk_mb = 512\n'
    b"[execution]\nready = 0\n"
)
HOTKEY = "5H728gLgx4yuCSVEwGCAfLo3RtzTau9F6cTNqNJtrqqjACWq"
DRAIN = timedelta(minutes=15)


class VirtualClock:
    """All clocks are the loop's."""

    def __init__(self) -> None:
        self._wall = Wall()

    def jump(self, by: timedelta) -> None:
        """The wall clock is set."""
        self._wall.off += by

    def now(self) -> datetime:
        return self._wall.now()

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def boottime(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Tree:
    """Code that is always there."""

    async def fetch(self, repository: str, commit: str) -> FetchedTree:
        return FetchedTree("b" * 64, Path("/nowhere"), TOML)

    def file_of(self, tree: FetchedTree, path: str) -> bytes:
        raise NotImplementedError


@dataclass
class Guests:
    """What the SDK in every CVM does: boots and works when it is let."""

    may_boot: asyncio.Event = field(default_factory=asyncio.Event)
    may_finish: asyncio.Event = field(default_factory=asyncio.Event)
    booting: asyncio.Event = field(default_factory=asyncio.Event)
    running: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: list[JobId] = field(default_factory=list)
    error: JobError | None = None
    dies: bool = False
    acknowledge: Callable[[GuestResult], Awaitable[None]] | None = None

    def session(
        self,
        callee: Callee,
        *,
        challenge_id: ChallengeId,
        env: Mapping[str, str],
        judge: Judge,
        values: ValuesHandler,
        pace: SessionPace | None = None,
        resume: bool = False,
    ) -> Session:
        return GatedSession(self, callee, judge, resume=resume)


class GatedSession:
    """A session that waits for the test."""

    def __init__(self, guests: Guests, callee: Callee, judge: Judge, *, resume: bool) -> None:
        self._guests = guests
        self._resume = resume
        self._callee = callee
        self._judge = judge
        self._closed = asyncio.Event()

    async def run(self) -> None:
        await self._closed.wait()

    async def ready(self) -> None:
        self._guests.booting.set()
        await self._guests.may_boot.wait()
        await self._judge(Offer(2, None, "", "", b"", VmName(self._callee.vm)))

    async def execute(
        self,
        order: JobOrder,
        submission: Path | None,
        *,
        on_started: Callable[[bool], None],
        on_progress: Callable[[float, str], None],
        on_log: Callable[[str, str], None],
    ) -> GuestResult:
        on_started(self._resume)
        self._guests.running.set()
        await self._guests.may_finish.wait()
        if self._guests.dies:
            raise SessionLost("its CVM died")
        error = self._guests.error
        return GuestResult(
            job_id=order.job_id,
            attempt=order.attempt,
            result={"score": 0.5} if error is None else None,
            error=error,
            evidence=None,
            logs=[],
            execution_time_ms=5,
            seq=1,
        )

    async def cancel(self, job_id: JobId, reason: str) -> None:
        self._guests.cancelled.append(job_id)

    async def confirm(self) -> None:
        pass

    async def acknowledge(self, result: GuestResult) -> None:
        if self._guests.acknowledge is not None:
            await self._guests.acknowledge(result)

    async def lost(self) -> Exception:
        await self._closed.wait()
        return SessionLost("closed")

    def close(self) -> None:
        self._closed.set()


class StuckVmm(MemoryVmm):
    """One whose StopVm may never answer."""

    stuck: asyncio.Event | None = None

    async def stop(self, vm_id: VmId) -> None:
        if self.stuck is not None:
            await self.stuck.wait()
        await super().stop(vm_id)


class World:
    """A Platform API, a VMM and a disk, which outlive the validators that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = VirtualClock()
        self.guests = Guests()
        self.guests.may_boot.set()
        self.platform = MemoryPlatform(term=timedelta(hours=2), now=self.clock.now)
        self.store = MemoryStore(identity=StateIdentity("0123456789", "instance"))
        self.vmm = StuckVmm()
        self.value_keys = MemoryKeys()
        self.source: Source = Tree()
        self.settings: Settings = load_settings(
            {"VALIDATOR_HOTKEY": HOTKEY, "PLATFORM_BASE_API": "http://nowhere"},
            flags={"sandbox_config.isolation_level": "Container"},
            folder=folder,
        )
        self._ids = itertools.count(1)
        self.platform.put_challenge(
            ActiveChallenge(
                id=CHALLENGE,
                name="digits",
                status="active",
                github_repo="https://github.com/o/digits",
                github_commit="a" * 40,
                resources=Resources(cpu_cores=1, memory_mb=256, disk_mb=512),
            )
        )

    async def until_ready(self, vm_id: VmId) -> tuple[str, int]:
        """The probe: whatever was made is up."""
        found = await self.vmm.get(vm_id)
        assert found is not None
        assert found.address is not None
        return found.address

    def engine(self, store: MemoryStore | None = None) -> Engine:
        """A validator's next life."""
        client, rng, store = self.platform.client(), random.Random(7), store or self.store
        metrics = Metrics()
        self.renewer = TaskRenewer(client=client, clock=self.clock, rules=LeaseRules())
        outside = Outside(
            clock=self.clock,
            client=client,
            hosts=(VmmHost(DEFAULT_HOST, self.vmm, self, HostPorts(10_000, 19_999)),),
            sessions=self.guests.session,
            source=self.source,
            policy=AttestationPolicy(level=IsolationLevel.CONTAINER, allow_simulated=False, checker=None),
            renewer=self.renewer,
            rng=rng,
            new_id=lambda: f"{next(self._ids):032x}",
            random_bytes=lambda count: b"s" * count,
        )
        parts = make_components(
            self.settings,
            outside,
            validator=Hotkey(HOTKEY),
            store=store,
            identity=StateIdentity("0123456789", "instance"),
            keyring=Keyring(b"k" * 32),
            values=make_values(self.settings, self.value_keys, store=store, clock=self.clock),
            metrics=metrics,
            cache=self.folder,
        )
        return Engine(
            parts=parts,
            client=client,
            store=store,
            clock=self.clock,
            rng=rng,
            metrics=metrics,
            drain_timeout=DRAIN,
        )


async def until(holds: Callable[[], bool]) -> None:
    """Virtual time passes until it does."""
    async with asyncio.timeout(3600):
        while not holds():
            await asyncio.sleep(0.05)


async def begun(world: World, phase: str) -> tuple[Engine, asyncio.Task[Drained], JobId]:
    """An engine whose one job is `booting` or `running`; the challenge's trial CVM is gone by then."""
    engine, guests = world.engine(), world.guests
    running = asyncio.create_task(engine.run())
    await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
    if phase == "booting":
        guests.may_boot.clear()
    guests.booting.clear()
    job_id = world.platform.add_job(CHALLENGE, timeout_s=7200)
    await (guests.booting if phase == "booting" else guests.running).wait()
    return engine, running, job_id


async def undelivered(world: World) -> tuple[Engine, asyncio.Task[Drained], JobId]:
    """An engine whose one job has ended, with the Platform API down: its result waits in the outbox."""
    engine, running, job_id = await begun(world, "running")
    world.platform.down = True
    world.guests.may_finish.set()
    await until(lambda: engine.parts.outbox.depth == 1)
    return engine, running, job_id


def play(story: Callable[[World], Coroutine[Any, Any, None]], folder: Path) -> None:
    """A story on a loop whose time is virtual."""

    async def told() -> None:
        await story(World(folder))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(told())
