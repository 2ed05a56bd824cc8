"""The fleet over a VMM in memory, guests of the real protocol on loopback, and the real store."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from platform_protocol.canonical import sha256_hex
from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_protocol.ids import ChallengeId, ClaimId, Hotkey, JobId, VmName
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.session.messages import JobExecute, ValuesRequest, ValuesResult
from platform_protocol.tokens import bundle_authorization
from platform_protocol.user_config import UserConfig
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.clock import SystemClock
from platform_validator.cvm import errors, probe
from platform_validator.cvm.connection import SessionPace
from platform_validator.cvm.destroyer import Destroyer
from platform_validator.cvm.fleet import Cvm, Fleet, FleetRules
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import Hosts, VmmHost
from platform_validator.cvm.jobs import GuestResult, JobOrder
from platform_validator.cvm.memory import IMAGE, MemoryVmm
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.probe import HttpProbe
from platform_validator.cvm.quota import Limits, Quota, Refusal, Reservation
from platform_validator.cvm.testing_guest import GuestScript, ScriptedGuest
from platform_validator.cvm.vmm import VmmAtCapacity, VmmRefused, VmmUnavailable, VmSpec, VmState
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.keyring import Keyring
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import Purpose, StateIdentity, VmPhase
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


class NoValues:
    async def answer(
        self, challenge_id: ChallengeId, session_id: str, request: ValuesRequest
    ) -> ValuesResult:
        return ValuesResult(request_id=request.request_id)


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


def free_ports(count: int) -> tuple[int, int]:
    """A range of loopback ports that nobody listens on now."""
    while True:
        first = random.randrange(20_000, 30_000)  # noqa: S311 - a place to look
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first, first + count - 1


def the_host(vmm: MemoryVmm, clock: QuickClock, ports: tuple[int, int]) -> Hosts:
    """The only one."""
    return Hosts(
        [VmmHost(DEFAULT_HOST, vmm, HttpProbe(vmm=vmm, clock=clock), HostPorts(*ports))], clock=clock
    )


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    async with contextlib.AsyncExitStack() as stack:
        opened = itertools.count()

        async def make(*, ports: int = 8, **rules: Any) -> World:
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
                hosts=the_host(vmm, clock, free_ports(ports)),
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
            )
            group = await stack.enter_async_context(asyncio.TaskGroup())
            running = group.create_task(fleet.run())
            stack.callback(running.cancel)
            await asyncio.sleep(0)
            return World(fleet, vmm, store, quota, clock, script, journal, specs)

        yield make


async def test_a_booted_cvm_is_attested_configured_and_ready(make_world: MakeWorld) -> None:
    """Boot ends with a session to the SDK inside, at the image's level, and says its stages in order."""
    world = await make_world()
    cvm = await world.boot()
    assert world.stages == ["creating", "booting", "attesting"]
    assert (cvm.attestation, cvm.isolation_level) == (AttestationKind.NONE, IsolationLevel.CONTAINER)
    guest = world.vmm.machine(cvm.name).guest
    assert guest is not None
    assert [(c.env, c.challenge_id) for c in guest.configured] == [
        ({"TOKEN": "operator-secret"}, PLAN.challenge_id)
    ]
    [view] = world.fleet.views()
    assert (view.name, view.stage, view.attestation) == (cvm.name, "ready", "none")
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()


async def test_every_step_is_journaled_before_it_is_taken(make_world: MakeWorld) -> None:
    """Intent before CreateVm, the id after it, the finding before configure, `destroying` before the end."""
    world = await make_world()
    cvm = await world.boot()
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()
    assert world.journal == [
        "intend_vm",
        "guest",
        "vm_created",
        "vm_attested",
        "vm_phase:ready",
        "vm_phase:destroying",
        "vm_phase:gone",
    ]


async def test_names_secrets_and_lifetimes_of_a_job_s_cvm(make_world: MakeWorld) -> None:
    """The name has our state id; the secret is sealed in the journal, for this VM's name alone."""
    world = await make_world()
    cvm = await world.boot()
    record = await world.store.vm(cvm.name)
    config = UserConfig.model_validate_json(world.specs[0].user_config)
    assert cvm.name.startswith("pv-0123456789-")
    assert len(cvm.name) == len("pv-0123456789-") + 36
    assert config.secret not in record.sealed_secret
    assert Keyring(b"k" * 32).open(record.sealed_secret, cvm.name.encode()) == config.secret
    assert (config.vm, config.proxy_url) == (cvm.name, None)
    assert config.max_lifetime_s == config.hard_lifetime_s == 300 + 300 + 3600
    assert config.filesystem == FilesystemPolicy()
    assert record.hard_deadline - record.intended_at == timedelta(seconds=config.hard_lifetime_s)
    assert "operator-secret" not in world.specs[0].user_config


async def test_the_operator_s_filesystem_policy_goes_with_every_cvm(make_world: MakeWorld) -> None:
    """Unmeasured, beside the lifetimes, for the VMM to enforce."""
    policy = FilesystemPolicy(allowed_paths=("/scratch",), tmpfs_size_mb=64)
    world = await make_world(filesystem=policy)
    await world.boot()
    assert UserConfig.model_validate_json(world.specs[0].user_config).filesystem == policy


async def test_ready_and_shared_cvms_live_longer_than_a_job_s(make_world: MakeWorld) -> None:
    """24 h idle and 7 days hard."""
    world = await make_world()
    await world.boot(purpose=Purpose.READY)
    config = UserConfig.model_validate_json(world.specs[0].user_config)
    assert (config.max_lifetime_s, config.hard_lifetime_s) == (24 * 3600, 7 * 24 * 3600)


@pytest.mark.parametrize(
    ("level", "simulated", "tee", "simulated_tee"),
    [
        (IsolationLevel.TEE, False, True, False),
        (IsolationLevel.VM, False, False, False),
        (IsolationLevel.VM, True, False, True),
        (IsolationLevel.CONTAINER, True, False, True),
        (IsolationLevel.NONE, False, False, False),
    ],
)
async def test_the_level_decides_what_is_asked_of_the_vmm(
    make_world: MakeWorld, level: IsolationLevel, simulated: bool, tee: bool, simulated_tee: bool
) -> None:
    """no_tee below Tee; simulated quotes only where they are allowed, and never beside a real TEE."""
    world = await make_world(level=level, allow_simulated=simulated)
    world.vmm.fail("create", VmmRefused("enough seen"))
    with pytest.raises(errors.CreateFailed):
        await world.boot()
    assert [(spec.tee, spec.simulated_tee) for spec in world.vmm.asked] == [(tee, simulated_tee)]


@pytest.mark.parametrize("write", WRITES)
async def test_a_store_that_cannot_write_leaves_nothing_running(make_world: MakeWorld, write: str) -> None:
    """Whichever write fails, boot says so; the VM is destroyed even while the store stays broken."""
    world = await make_world()
    world.store.broken = {write}
    with pytest.raises(StoreUnavailable):
        await world.boot()
    async with asyncio.timeout(5):
        while world.vmm.machines():
            await asyncio.sleep(0.01)
    world.store.broken = set()
    await world.nothing_is_left()


async def test_nothing_is_created_that_was_not_journaled(make_world: MakeWorld) -> None:
    """Without an intent in the journal CreateVm is never sent."""
    world = await make_world()
    world.store.broken = {"intend_vm"}
    with pytest.raises(StoreUnavailable):
        await world.boot()
    assert "create" not in world.vmm.calls
    assert world.quota.view().cvms == 0


@pytest.mark.parametrize("stage", ["creating", "booting", "attesting"])
async def test_a_cancelled_boot_is_destroyed(make_world: MakeWorld, stage: str) -> None:
    """At every stage: the VM goes, and its reservation comes back once."""
    world = await make_world()
    boots: list[asyncio.Task[Cvm]] = []

    def cancel(name: str) -> None:
        if name == stage:
            boots[0].cancel()

    async with asyncio.TaskGroup() as group:
        boots.append(
            group.create_task(
                world.fleet.boot(
                    PLAN,
                    purpose=Purpose.JOB,
                    reservation=world.reserve(),
                    claim_id=ClaimId("claim-1"),
                    on_stage=cancel,
                )
            )
        )
    assert boots[0].cancelled()
    await world.nothing_is_left()


async def test_a_create_that_was_done_but_not_answered_is_found_by_its_name(make_world: MakeWorld) -> None:
    """CreateVm is not idempotent: the VM of exactly that name is taken, and no second one is made."""
    world = await make_world()
    world.vmm.fail("create", VmmUnavailable("timed out"), after=True)
    cvm = await world.boot()
    assert world.vmm.calls.count("create") == 1
    assert world.vmm.machine(cvm.name).id == cvm.vm_id


async def test_a_create_that_is_done_after_all_was_given_up_is_swept(make_world: MakeWorld) -> None:
    """The journal says gone, the VMM shows it: ours by exact name, so it is destroyed again."""
    world = await make_world()
    world.vmm.fail("create", VmmUnavailable("timed out"))
    with pytest.raises(VmmUnavailable):
        await world.boot()
    await world.nothing_is_left()
    world.vmm.make_late(world.vmm.asked[0])
    await world.fleet.sweep()
    await world.nothing_is_left()
    assert world.fleet.strays == ()


async def test_each_vm_has_a_launch_secret_of_its_own(make_world: MakeWorld) -> None:
    """Made for it, 32 bytes, and never another's."""
    world = await make_world()
    for _ in range(2):
        await world.boot(purpose=Purpose.READY)
    secrets = {UserConfig.model_validate_json(spec.user_config).secret for spec in world.vmm.asked}
    assert [len(one) for one in secrets] == [32, 32]


def a_spec(name: VmName) -> VmSpec:
    """A VM of that name, as a CreateVm from before would make it."""
    config = UserConfig(
        vm=name,
        launch_secret=UserConfig.encode_secret(b"s" * 32),
        validator_base_url="http://10.0.2.2:18080",
        proxy_url=None,
        max_lifetime_s=1,
        hard_lifetime_s=1,
    )
    return VmSpec(
        name=name,
        image=IMAGE,
        compose=COMPOSE,
        user_config=config.model_dump_json(),
        resources=RESOURCES,
        host_port=0,
        guest_port=10000,
        tee=False,
        simulated_tee=False,
    )


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        (VmmAtCapacity("no CID available"), errors.NoCapacity),
        (VmmRefused("Failed to read compose file"), errors.CreateFailed),
        (VmmUnavailable("no answer"), VmmUnavailable),
    ],
)
async def test_a_refused_create_is_named_and_gives_back_its_share(
    make_world: MakeWorld, said: Exception, raised: type[Exception]
) -> None:
    """Full, refused and unanswered are three things."""
    world = await make_world()
    world.vmm.fail("create", said)  # type: ignore[arg-type]  # a VmmError, as parametrised
    with pytest.raises(raised):
        await world.boot()
    await world.nothing_is_left()


async def test_a_port_in_use_is_replaced_by_another(make_world: MakeWorld) -> None:
    """Somebody else listens there: the next CVM gets the next port, and the first one is destroyed."""
    world = await make_world()
    first = world.fleet.hosts.get(DEFAULT_HOST).ports._next
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", first))
        holder.listen()
        cvm = await world.boot()
    assert [spec.host_port for spec in world.specs] == [first, first + 1]
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()


async def test_five_ports_in_use_are_no_capacity(make_world: MakeWorld) -> None:
    """It is given up after five, and says so."""
    world = await make_world()
    world.vmm.fail("create", VmmRefused("port mapping tcp:1 conflicts with VM x"), times=5)
    with pytest.raises(errors.NoCapacity, match="5 tries"):
        await world.boot()
    assert world.vmm.calls.count("create") == 5
    await world.nothing_is_left()


async def test_no_free_host_port_is_no_capacity(make_world: MakeWorld) -> None:
    """Our own range is full: the reservation comes back and the VMM is not asked."""
    world = await make_world(ports=1)
    await world.boot()
    with pytest.raises(errors.NoCapacity, match="port_range"):
        await world.boot()
    assert world.quota.view().cvms == 1


async def test_a_boot_error_of_the_vmm_is_the_reason(make_world: MakeWorld) -> None:
    """The VMM's word is in the message."""
    world = await make_world()
    world.script.status = "starting"
    booting = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        boot = group.create_task(caught(world, booting))
        await booting.wait()
        world.vmm.machines()[0].boot_error = "services.web: no such image"
    assert isinstance(boot.result(), errors.BootFailed)
    assert "no such image" in str(boot.result())
    await world.nothing_is_left()


@pytest.mark.parametrize("state", [VmState.EXITED, VmState.STOPPED])
async def test_a_vm_that_ends_while_booting_has_failed(make_world: MakeWorld, state: VmState) -> None:
    """With the end of its console, and without waiting for the deadline."""
    world = await make_world()
    world.script.status = "starting"
    booting = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        boot = group.create_task(caught(world, booting))
        await booting.wait()
        machine = world.vmm.machines()[0]
        machine.console.append("Kernel panic")
        machine.state = state
    assert "Kernel panic" in str(boot.result())
    await world.nothing_is_left()


async def test_a_challenge_that_fails_to_import_says_why(make_world: MakeWorld) -> None:
    """Health `failed` ends the boot at once, with the SDK's error."""
    world = await make_world()
    world.script.status, world.script.error = "failed", "ImportError: no module named foo"
    with pytest.raises(errors.BootFailed, match="no module named foo"):
        await world.boot()
    await world.nothing_is_left()


async def test_a_startup_handler_that_fails_is_a_refusal(make_world: MakeWorld) -> None:
    """The SDK says error instead of ready."""
    world = await make_world()
    world.script.startup_error = "on_startup: ValueError"
    with pytest.raises(errors.SessionRefused, match="on_startup"):
        await world.boot()
    await world.nothing_is_left()


async def test_a_boot_has_a_deadline(make_world: MakeWorld) -> None:
    """It says running and its SDK never answers ready."""
    world = await make_world(boot=timedelta(seconds=0.2))
    world.script.status = "starting"
    with pytest.raises(errors.BootTimedOut):
        await world.boot()
    await world.nothing_is_left()


async def test_what_answers_under_another_name_is_not_our_vm(make_world: MakeWorld) -> None:
    """A port that leads to another VM: nothing is configured."""
    world = await make_world()
    world.script.says_name = VmName("pv-0123456789-another")
    with pytest.raises(errors.SessionRefused, match="another"):
        await world.boot()
    await world.nothing_is_left()


async def test_a_missing_quote_is_refused_where_simulated_ones_are_asked_for(make_world: MakeWorld) -> None:
    """allow_simulated asks for a quote; none came: no environment goes in."""
    world = await make_world(allow_simulated=True)
    with pytest.raises(errors.AttestationRefused) as caught_error:
        await world.boot()
    assert caught_error.value.check == "quote_missing"
    await world.nothing_is_left()


async def test_a_bundle_is_for_the_cvm_that_boots_and_for_no_other(make_world: MakeWorld) -> None:
    """Only while it creates or boots, only for its own plan's bundle, only with its own secret."""
    world = await make_world()
    world.script.status = "starting"
    booting = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        boot = group.create_task(caught(world, booting))
        await booting.wait()
        config = UserConfig.model_validate_json(world.specs[0].user_config)
        header = bundle_authorization(config.secret, config.vm, BUNDLE)
        assert world.fleet.may_fetch_bundle(header, BUNDLE)
        assert not world.fleet.may_fetch_bundle(header, "c" * 64)
        other = bundle_authorization(config.secret, config.vm, "c" * 64)
        assert not world.fleet.may_fetch_bundle(other, "c" * 64)
        assert not world.fleet.may_fetch_bundle(bundle_authorization(b"x" * 32, config.vm, BUNDLE), BUNDLE)
        assert not world.fleet.may_fetch_bundle("", BUNDLE)
        world.script.status = "ready"
        world.vmm.machines()[0].guest.script.status = "ready"  # type: ignore[union-attr]  # it serves
    assert isinstance(boot.result(), Cvm)
    assert not world.fleet.may_fetch_bundle(header, BUNDLE)


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


async def test_destruction_is_tried_for_ever_and_holds_the_share_until_the_vm_is_gone(
    make_world: MakeWorld,
) -> None:
    """Refusals and silence are counted and shown; the reservation comes back only with the confirmation."""
    world = await make_world()
    cvm = await world.boot()
    world.vmm.fail("stop", VmmUnavailable("no answer"), times=3)
    world.vmm.fail("remove", VmmRefused("VM is running, stop it first"), times=2)
    world.vmm.removes_at_once = False
    world.fleet.destroy(cvm.name)
    world.fleet.destroy(cvm.name)
    async with asyncio.timeout(5):
        while not any(machine.state is VmState.REMOVING for machine in world.vmm.machines()):
            await asyncio.sleep(0.01)
    [view] = world.fleet.views()
    assert (view.stage, view.tries) == ("destroying", 5)
    assert "stop it first" in str(view.last_error)
    assert world.quota.view().cvms == 1
    world.vmm.finish_removals()
    await world.nothing_is_left()


async def test_a_vm_that_somebody_else_removed_is_gone(make_world: MakeWorld) -> None:
    """Not found is what was wanted."""
    world = await make_world()
    cvm = await world.boot()
    world.vmm.vanish(cvm.name)
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()


def restarted(world: World, quota: Quota) -> Fleet:
    """The fleet of a process that starts on the same journal."""
    return Fleet(
        hosts=the_host(world.vmm, world.clock, free_ports(4)),
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
    )


async def test_a_restart_holds_what_still_runs_until_it_is_given_up(make_world: MakeWorld) -> None:
    """Quota and ports are rebuilt from the journal; the sweep leaves what may yet be adopted."""
    world = await make_world()
    cvm = await world.boot()
    later = Quota(LIMITS)
    fleet = restarted(world, later)
    await fleet.restore()
    assert later.view().used == RESOURCES
    [view] = fleet.views()
    assert (view.name, view.challenge_id, view.stage) == (cvm.name, PLAN.challenge_id, "restored")
    await fleet.sweep()
    assert fleet.destroyer.names == set()
    fleet.destroy(cvm.name)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(fleet.run())
        await fleet.destroyer.finish()
        running.cancel()
    assert world.vmm.machines() == []
    assert later.view().cvms == 0
    assert fleet.views() == []


ORDER = JobOrder(JobId("job-1"), 1, PLAN.challenge_id, None, {}, None)


async def carried_on(fleet: Fleet, name: VmName) -> GuestResult | errors.CvmError:
    """Adopt a CVM and wait for the job's result, or for what ends it."""
    await fleet.restore()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(fleet.run())
        while fleet._tasks is None:
            await asyncio.sleep(0)
        try:
            cvm = await fleet.adopt(name, PLAN)
            return await cvm.session.execute(
                ORDER,
                None,
                on_started=lambda _already: None,
                on_progress=lambda *_: None,
                on_log=lambda *_: None,
            )
        except errors.CvmError as error:
            return error
        finally:
            running.cancel()


async def test_a_running_job_is_adopted_by_a_later_process(make_world: MakeWorld) -> None:
    """The session is resumed with what the journal holds; the job runs once and its result arrives."""
    world = await make_world()
    finish = asyncio.Event()

    async def work(_guest: ScriptedGuest, order: JobExecute, _submission: bytes) -> dict[str, Any]:
        await finish.wait()
        return {"score": 0.25, "job": order.job_id}

    world.script.work = work
    cvm = await world.boot()
    first = asyncio.create_task(
        cvm.session.execute(
            ORDER, None, on_started=lambda _already: None, on_progress=lambda *_: None, on_log=lambda *_: None
        )
    )
    guest = world.vmm.machine(cvm.name).guest
    assert guest is not None
    await guest.until(lambda guest: len(guest.orders) == 1)
    cvm.session.close()
    with pytest.raises(errors.SessionLost):
        await first
    finish.set()
    result = await carried_on(restarted(world, Quota(LIMITS)), cvm.name)
    assert isinstance(result, GuestResult)
    assert result.result == {"score": 0.25, "job": "job-1"}
    assert (len(guest.orders), len(guest.configured)) == (1, 1)


async def test_what_receipts_tell_of_the_os_image_outlives_the_process(make_world: MakeWorld) -> None:
    """It was journaled before anything went in; who adopts the CVM tells the same."""
    world, told = await make_world(), '{"trust":"pinned_first_use"}'
    cvm = await world.boot()
    await world.store.vm_attested(cvm.name, attestation="none", vm_instance=None, os_image=told)
    cvm.session.close()
    fleet = restarted(world, Quota(LIMITS))
    await fleet.restore()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(fleet.run())
        while fleet._tasks is None:
            await asyncio.sleep(0)
        assert (await fleet.adopt(cvm.name, PLAN)).os_image == told
        running.cancel()


async def test_a_vmm_that_restarts_ends_neither_a_boot_nor_an_adoption(make_world: MakeWorld) -> None:
    """Its VMs go on without it, as dstack's do: it is asked again until it is back."""
    world = await make_world()
    world.vmm.fail("get", VmmUnavailable("restarting"), times=3)
    cvm = await world.boot()
    cvm.session.close()
    world.vmm.fail("get", VmmUnavailable("restarting"), times=3)
    result = await carried_on(restarted(world, Quota(LIMITS)), cvm.name)
    assert isinstance(result, GuestResult)


async def test_a_vmm_that_stays_away_ends_a_boot(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its time; what was made is destroyed once it is back."""
    monkeypatch.setattr(probe, "ABSENCE", timedelta(0))
    world = await make_world()
    world.vmm.fail("get", VmmUnavailable("gone"))
    with pytest.raises(VmmUnavailable):
        await world.boot()
    await world.nothing_is_left()


async def test_what_rebooted_meanwhile_is_not_adopted(make_world: MakeWorld) -> None:
    """It does not know the session any more: whatever it would say is about another life."""
    world = await make_world()
    cvm = await world.boot()
    world.vmm.restart(cvm.name)
    fleet = restarted(world, Quota(LIMITS))
    found = await carried_on(fleet, cvm.name)
    assert isinstance(found, errors.SessionLost)
    assert "rebooted" in str(found)
    assert cvm.name in fleet.destroyer.names


async def test_foreign_vms_survive_the_sweep(make_world: MakeWorld) -> None:
    """Also one whose name begins like ours, and one with our state id that the journal does not know."""
    world = await make_world()
    names = [VmName("somebody-elses"), VmName("pv-0123456789-restored"), VmName("pv-0123456789x")]
    low, _ = free_ports(3)
    for number, name in enumerate(names):
        world.vmm.make_late(replace(a_spec(name), host_port=low + number))
    await world.fleet.sweep()
    assert [machine.spec.name for machine in world.vmm.machines()] == names
    assert world.fleet.strays == ("pv-0123456789-restored",)


async def test_a_stray_is_destroyed_when_the_operator_names_it(make_world: MakeWorld) -> None:
    """Only what is a stray now: neither a name that was made up, nor a VM of somebody else's."""
    world = await make_world()
    stray, foreign = VmName("pv-0123456789-restored"), VmName("pv-9999999999-anothers")
    ours = await world.boot()
    low, _ = free_ports(3)
    for number, name in enumerate((stray, foreign)):
        world.vmm.make_late(replace(a_spec(name), host_port=low + number))
    assert await world.fleet.reclaim_strays([stray, foreign, ours.name, VmName("made-up")]) == [stray]
    await world.fleet.destroyer.finish()
    assert {machine.spec.name for machine in world.vmm.machines()} == {foreign, ours.name}
    await world.fleet.sweep()
    assert world.fleet.strays == ()


async def test_a_cvm_past_its_hard_deadline_is_destroyed_though_it_is_held(make_world: MakeWorld) -> None:
    """While the validator lives, no CVM outlives its record."""
    world = await make_world()
    await world.boot()
    await world.fleet.sweep()
    assert len(world.vmm.machines()) == 1
    world.clock.ahead = timedelta(hours=2)
    await world.fleet.sweep()
    await world.nothing_is_left()


async def test_destruction_that_was_interrupted_goes_on(make_world: MakeWorld) -> None:
    """A loop that died and is run again loses nothing that was given up before."""
    world = await make_world()
    cvm = await world.boot()
    gone: list[VmName] = []
    destroyer = Destroyer(hosts=world.fleet.hosts, store=world.store, clock=world.clock, on_gone=gone.append)
    world.vmm.removes_at_once = False
    destroyer.give(cvm.name)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(destroyer.run())
        async with asyncio.timeout(5):
            while world.vmm.machines()[0].state is not VmState.REMOVING:
                await asyncio.sleep(0.01)
        first.cancel()
    world.vmm.finish_removals()
    async with asyncio.TaskGroup() as group:
        second = group.create_task(destroyer.run())
        await destroyer.finish()
        second.cancel()
    assert gone == [cvm.name]
    assert (await world.store.vm(cvm.name)).phase is VmPhase.GONE


async def test_a_cvm_given_up_twice_in_its_life_is_destroyed_twice(make_world: MakeWorld) -> None:
    """It was gone, a late create brought it back, and it is given up again."""
    world = await make_world()
    cvm = await world.boot()
    for _ in range(2):
        world.fleet.destroy(cvm.name)
        await world.nothing_is_left()
        world.vmm.make_late(world.vmm.asked[0])
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()
