"""A fleet over two hosts: spread, cordoned, drained, swept and emptied, each by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest
from no_values import NoValues
from ports import free_range
from waiting import until

from platform_protocol.canonical import sha256_hex
from platform_protocol.ids import ChallengeId, ClaimId, Hotkey, JobId, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.session.messages import JobError
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.clock import SystemClock
from platform_validator.cvm.connection import SessionPace
from platform_validator.cvm.errors import CreateFailed, NoCapacity, SessionLost
from platform_validator.cvm.fleet import Cvm, Fleet, FleetRules
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import Hosts, UnknownHost, VmmHost
from platform_validator.cvm.jobs import JobOrder
from platform_validator.cvm.memory import IMAGE, MemoryVmm
from platform_validator.cvm.placement import Limits
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.probe import HttpProbe
from platform_validator.cvm.quota import Quota, Refusal
from platform_validator.cvm.testing_guest import GuestScript
from platform_validator.cvm.vmm import VmmAtCapacity, VmmFacts, VmmImage, VmmRefused, VmmUnavailable, VmSpec
from platform_validator.host_name import HostName
from platform_validator.jobs.ending import blame
from platform_validator.keyring import Keyring
from platform_validator.store.memory import MemoryStore
from platform_validator.store.records import JobOutcome, Purpose, Stage, StateIdentity, VmPhase

BIG, SMALL = HostName("big"), HostName("small")
TOTALS = Limits(Resources(cpu_cores=9, memory_mb=9000, disk_mb=9000), max_cvms=9)
BOUNDS = {
    BIG: Limits(Resources(cpu_cores=4, memory_mb=4000, disk_mb=4000), max_cvms=4),
    SMALL: Limits(Resources(cpu_cores=2, memory_mb=2000, disk_mb=2000), max_cvms=2),
}
LARGE = Resources(cpu_cores=1, memory_mb=2500, disk_mb=500)
ONE = Resources(cpu_cores=1, memory_mb=500, disk_mb=500)
QUICK = SessionPace(dial=2, handshake=2, send=2, resume_for=30, retry=0.01, retry_most=0.02)
COMPOSE = b'{"manifest_version":2}'
PLAN = CvmPlan(
    challenge_id=ChallengeId("00000000-0000-4000-8000-0000000000c1"),
    instance_key="c@1",
    commit="c" * 40,
    image=IMAGE,
    compose=COMPOSE,
    compose_hash=sha256_hex(COMPOSE),
    bundle_sha256="b" * 64,
    resources=ONE,
    timeout=timedelta(minutes=5),
)


class QuickClock(SystemClock):
    """The system's clocks, put forward at will; sleeping is shortened."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self.longest = 0.01

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(self.longest if self.longest > 1 else min(seconds, self.longest))


async def never(*_: object) -> JobError:
    """A submission that goes on and on."""
    await asyncio.Event().wait()
    raise AssertionError("nobody lets it end")


@dataclass
class World:
    """Two hosts, and a fleet over them."""

    vmms: dict[HostName, MemoryVmm]
    store: MemoryStore
    clock: QuickClock
    ports: HostPorts
    hosts: Hosts
    quota: Quota
    fleet: Fleet
    reclaimed: list[bool] = field(default_factory=list)

    async def boot(self, size: Resources = ONE, purpose: Purpose = Purpose.READY) -> Cvm:
        """A CVM where placement has it."""
        share = self.quota.reserve(size, "test", image=IMAGE)
        assert not isinstance(share, Refusal), str(share)
        claim = ClaimId("claim") if purpose is Purpose.JOB else None
        return await self.fleet.boot(
            PLAN, purpose=purpose, reservation=share, claim_id=claim, on_stage=lambda _: None
        )

    def where(self) -> dict[HostName, int]:
        """How many VMs each host has."""
        return {name: len(vmm.machines()) for name, vmm in self.vmms.items()}

    def state(self, host: HostName) -> str:
        """A host's, as people see it."""
        return next(one.state for one in self.hosts.status() if one.name == host)

    def host_of(self, name: VmName) -> HostName:
        """Where a CVM is."""
        return next(view.host for view in self.fleet.views() if view.name == name)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for it."""
        await until(holds)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        vmms = {
            name: await stack.enter_async_context(MemoryVmm(script=lambda _: GuestScript(work=never)))
            for name in BOUNDS
        }
        store, clock, ports = MemoryStore(), QuickClock(), HostPorts(*free_range(60))
        made = put_together(vmms, store, clock, ports)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        running = group.create_task(made.fleet.run())
        stack.callback(running.cancel)
        await made.until(lambda: all(one.error is None for one in made.hosts.status()))
        yield made


def put_together(
    vmms: dict[HostName, MemoryVmm], store: MemoryStore, clock: QuickClock, ports: HostPorts
) -> World:
    """A process over what is there."""
    hosts = Hosts(
        [
            VmmHost(name, vmm, HttpProbe(vmm=vmm, clock=clock), ports, limits=BOUNDS[name])
            for name, vmm in vmms.items()
        ],
        clock=clock,
    )
    quota = Quota(TOTALS, hosts.states)
    reclaimed: list[bool] = []
    fleet = Fleet(
        hosts=hosts,
        store=store,
        keyring=Keyring(b"k" * 32),
        quota=quota,
        policy=AttestationPolicy(level=IsolationLevel.CONTAINER, allow_simulated=False, checker=None),
        values=NoValues(),
        clock=clock,
        identity=StateIdentity("0123456789", "instance"),
        validator=Hotkey("5DD"),
        rules=FleetRules(
            IsolationLevel.CONTAINER,
            allow_simulated=False,
            base_url="http://10.0.2.2:18080",
            alive=timedelta(seconds=0.5),
            pace=QUICK,
        ),
        on_reclaimed=lambda _: reclaimed.append(True),
    )
    return World(vmms, store, clock, ports, hosts, quota, fleet, reclaimed)


async def test_cvms_are_spread_and_each_host_s_limits_hold(world: World) -> None:
    """Six fit on both, four on the big one; the seventh is refused with the reason of the nearest."""
    names = [(await world.boot()).name for _ in range(6)]
    assert world.where() == {BIG: 4, SMALL: 2}
    refusal = world.quota.reserve(ONE, "seventh", image=IMAGE)
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.host) == ("cpu", BIG)
    journaled = {vm.name: vm.host for vm in await world.store.open_vms()}
    assert journaled == {name: world.host_of(name) for name in names}
    assert {host: part.cvms for host, part in world.quota.view().by_host.items()} == {BIG: 4, SMALL: 2}


async def test_a_host_that_falls_silent_is_cordoned_and_the_other_goes_on(world: World) -> None:
    """What was on it is let go, keeps its share until the host is back, and is then destroyed at once."""
    lost = await world.boot(purpose=Purpose.JOB)
    assert world.host_of(lost.name) == BIG
    order = JobOrder(JobId("j"), 1, PLAN.challenge_id, None, {}, None)
    running = asyncio.Event()
    job = asyncio.ensure_future(
        lost.session.execute(
            order,
            None,
            on_started=lambda _: None,
            on_progress=lambda *_: running.set(),
            on_log=lambda *_: None,
        )
    )
    await running.wait()
    world.vmms[BIG].kill()
    with pytest.raises(SessionLost) as caught:
        async with asyncio.timeout(25):
            await job
    assert world.state(BIG) == "cordoned"
    ending = blame(caught.value, stage=Stage.RUNNING, started=True, host=await world.fleet.trouble(lost.name))
    assert (ending.outcome, ending.release) == (JobOutcome.INFRA_ERROR, "infra")
    world.fleet.destroy(lost.name)
    kept = [await world.boot(), await world.boot()]
    assert {world.host_of(cvm.name) for cvm in kept} == {SMALL}
    assert world.quota.view().by_host[BIG].cvms == 1
    refusal = world.quota.reserve(ONE, "more", image=IMAGE)
    assert isinstance(refusal, Refusal)
    assert refusal.host == SMALL
    world.vmms[BIG].start_again()
    await world.until(lambda: world.where() == {BIG: 0, SMALL: 2})
    await world.until(lambda: world.state(BIG) == "open" and world.quota.view().by_host[BIG].cvms == 0)
    record = await world.store.vm(lost.name)
    assert record is not None
    assert record.phase is VmPhase.GONE


async def test_what_is_on_a_host_that_is_back_is_destroyed_at_once(world: World) -> None:
    """Whatever its destruction was to wait for: every pause is an hour here."""
    cvm = await world.boot()
    world.vmms[BIG].kill()
    await world.until(lambda: world.state(BIG) == "cordoned")
    world.clock.longest = 3600.0
    world.fleet.destroy(cvm.name)
    await world.until(lambda: any(view.tries for view in world.fleet.views()))
    world.vmms[BIG].start_again()
    assert await world.fleet.trouble(cvm.name) is None
    await world.until(lambda: world.where() == {BIG: 0, SMALL: 0})


async def test_a_cvm_whose_session_lives_goes_on_while_its_vmm_is_silent(world: World) -> None:
    """A VMM that is restarted costs nothing that runs."""
    cvm = await world.boot()
    for call in ("facts", "list", "get"):
        world.vmms[BIG].fail(call, VmmUnavailable("restarting"), times=200)
    await world.until(lambda: world.state(BIG) == "cordoned")
    await cvm.session.confirm()
    world.vmms[BIG].heal()
    await world.until(lambda: world.state(BIG) == "open")
    await cvm.session.confirm()
    assert [view.stage for view in world.fleet.views()] == ["ready"]


async def test_a_host_that_cannot_make_cvms_is_closed_and_tried_with_one(world: World) -> None:
    """Three refusals in a row; the probe that comes up opens it."""
    world.vmms[BIG].fail("create", VmmRefused("internal error"), times=4)
    for _ in range(3):
        with pytest.raises(CreateFailed):
            await world.boot(LARGE)
        await world.until(lambda: not world.fleet.views())
    assert world.state(BIG) == "cordoned"
    world.clock.ahead += 30
    assert world.state(BIG) == "half_open"
    with pytest.raises(CreateFailed):
        await world.boot(LARGE)
    assert world.state(BIG) == "cordoned"
    world.clock.ahead += 60
    await world.until(lambda: not world.fleet.views())
    first = world.quota.reserve(LARGE, "probe", image=IMAGE)
    assert not isinstance(first, Refusal)
    assert (first.host, first.probe) == (BIG, True)
    world.hosts.drained({SMALL: world.clock.now()})
    second = world.quota.reserve(ONE, "beside it", image=IMAGE)
    assert isinstance(second, Refusal)
    assert second.reason == "host"
    await world.fleet.boot(
        PLAN, purpose=Purpose.READY, reservation=first, claim_id=None, on_stage=lambda _: None
    )
    assert world.state(BIG) == "open"


async def test_a_host_without_room_is_left_alone_for_a_moment(world: World) -> None:
    """A lack of capacity is no failure of anybody; the next CVM is made elsewhere."""
    running = await world.boot()
    world.vmms[BIG].fail("create", VmmAtCapacity("not enough CIDs"))
    with pytest.raises(NoCapacity):
        await world.boot()
    await world.until(lambda: len(world.fleet.views()) == 1)
    assert world.state(BIG) == "cordoned"
    assert world.host_of((await world.boot()).name) == SMALL
    world.clock.ahead += 5
    assert world.state(BIG) == "half_open"
    world.vmms[BIG].fail("create", VmmAtCapacity("not enough CIDs"))
    with pytest.raises(NoCapacity):
        await world.boot(LARGE)
    assert world.state(BIG) == "cordoned"
    world.fleet.destroy(running.name)
    await world.until(lambda: world.state(BIG) == "half_open")


async def test_a_drained_host_gets_no_more_cvms_and_a_restart_remembers_it(world: World) -> None:
    """What runs there goes on; what stands ready is named, for whoever keeps it."""
    cvm = await world.boot()
    let_go: list[frozenset[VmName]] = []
    world.fleet.keeper.on_let_go = let_go.append
    await world.fleet.keeper.drain(BIG)
    assert (world.state(BIG), let_go) == ("drained", [frozenset({cvm.name})])
    for _ in range(2):
        assert world.host_of((await world.boot()).name) == SMALL
    refusal = world.quota.reserve(ONE, "more", image=IMAGE)
    assert isinstance(refusal, Refusal)
    await cvm.session.confirm()
    later = put_together(world.vmms, world.store, world.clock, world.ports)
    await later.fleet.restore()
    assert (later.state(BIG), later.state(SMALL)) == ("drained", "open")
    await world.fleet.keeper.undrain(BIG)
    assert world.state(BIG) == "open"
    with pytest.raises(UnknownHost, match="there are big, small"):
        await world.fleet.keeper.drain(HostName("huge"))


async def test_a_host_that_is_unreachable_at_the_start_makes_nothing_gone(world: World) -> None:
    """Its CVMs keep their shares; those of the other host are judged as ever."""
    for _ in range(3):
        await world.boot()
    assert world.where() == {BIG: 2, SMALL: 1}
    world.vmms[BIG].fail("list", VmmUnavailable("no answer"), times=1_000)
    later = put_together(world.vmms, world.store, world.clock, world.ports)
    await later.fleet.restore()
    await later.fleet.sweep()
    assert later.fleet.last_error == "big: no answer"
    assert {host: part.cvms for host, part in later.quota.view().by_host.items()} == {BIG: 2, SMALL: 1}
    assert len(await later.store.open_vms()) == 3


async def test_a_host_that_left_the_configuration_keeps_its_share_and_says_so(world: World) -> None:
    """Nobody can say that its CVMs are gone; they come back with its [[vmm]]."""
    cvm = await world.boot()
    rest = {name: vmm for name, vmm in world.vmms.items() if name != BIG}
    later = put_together(rest, world.store, world.clock, world.ports)
    await later.fleet.restore()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(later.fleet.run())
        later.fleet.destroy(cvm.name)
        await later.until(lambda: any(view.tries for view in later.fleet.views()))
        [view] = later.fleet.views()
        assert view.last_error == "VMM host 'big' is not in the configuration: put its [[vmm]] back"
        running.cancel()
    assert later.quota.view().cvms == 1


async def test_strays_and_late_creations_are_found_on_their_host(world: World) -> None:
    """A stray is named with its host; a CVM that a host made after all is destroyed there."""
    cvm = await world.boot()
    spec = world.vmms[BIG].asked[0]
    world.fleet.destroy(cvm.name)
    await world.until(lambda: world.where() == {BIG: 0, SMALL: 0})
    world.vmms[BIG].make_late(spec)
    stray = VmName("pv-0123456789-stray")
    world.vmms[SMALL].make_late(_renamed(spec, stray))
    await world.fleet.sweep()
    assert world.fleet.strays == (stray,)
    await world.until(lambda: world.where() == {BIG: 0, SMALL: 1})
    assert world.reclaimed == [True]
    assert await world.fleet.reclaim_strays([stray]) == [stray]
    await world.until(lambda: world.where() == {BIG: 0, SMALL: 0})


async def test_the_same_vm_seen_by_two_hosts_is_no_stray_of_the_other(world: World) -> None:
    """Two names for one VMM: what is ours stays ours."""
    cvm = await world.boot()
    world.vmms[SMALL].make_late(world.vmms[BIG].asked[0])
    await world.fleet.sweep()
    assert world.fleet.strays == ()
    assert [view.stage for view in world.fleet.views() if view.name == cvm.name] == ["ready"]
    # Nor for a process that holds nothing of it: SMALL, which is looked at alone, does not own its record.
    later = put_together(world.vmms, world.store, world.clock, world.ports)
    await later.fleet._sweeper.sweep_host(SMALL)
    assert (later.fleet.strays, later.fleet.views()) == ((), [])


class Offering(MemoryVmm):
    """A VMM with images of its own."""

    def __init__(self, *images: VmmImage) -> None:
        super().__init__()
        self.images = images

    async def facts(self) -> VmmFacts:
        """See the port."""
        await super().facts()
        return VmmFacts("0.6.0", self.images)


async def test_hosts_offer_their_images_together_and_each_gets_only_what_it_has() -> None:
    """An image of one name with other contents is another image: the first host's counts."""
    one, other = (VmmImage("os", IsolationLevel.VM, {"r": digest}) for digest in ("sha256:1", "sha256:2"))
    extra = VmmImage("extra", IsolationLevel.VM)
    vmms = {BIG: Offering(one), SMALL: Offering(other, extra)}
    world = put_together(dict(vmms), MemoryStore(), QuickClock(), HostPorts(1, 9))
    assert {state.name: state.images for state in world.hosts.states()} == {BIG: None, SMALL: None}
    facts = await world.hosts.facts()
    assert facts.images == (one, extra)
    images = {state.name: state.images for state in world.hosts.states()}
    assert images == {BIG: frozenset({"os"}), SMALL: frozenset({"extra"})}
    vmms[BIG].fail("facts", VmmUnavailable("no answer"))
    assert (await world.hosts.facts()).images == (one, extra)
    for vmm in vmms.values():
        vmm.fail("facts", VmmUnavailable("no answer"))
    with pytest.raises(VmmUnavailable):
        await world.hosts.facts()


def _renamed(spec: VmSpec, name: VmName) -> VmSpec:

    return replace(spec, name=name, host_port=spec.host_port + 40)
