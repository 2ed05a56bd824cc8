"""All CVMs of this validator: boots them, write-ahead, and hands them to destruction."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Callable, Collection
from datetime import timedelta

import structlog

from platform_protocol.ids import ClaimId, Hotkey, VmName
from platform_protocol.tokens import bundle_vm, check_bundle_authorization
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.clock import Clock
from platform_validator.cvm.booting import Booter, FleetRules
from platform_validator.cvm.destroyer import Destroyer
from platform_validator.cvm.errors import (
    AttestationRefused,
    BootFailed,
    CreateFailed,
    NoCapacity,
    SessionLost,
    is_port_conflict,
)
from platform_validator.cvm.holdings import Holdings
from platform_validator.cvm.host_keeper import HostKeeper
from platform_validator.cvm.hosts import Hosts
from platform_validator.cvm.members import Cvm, CvmView, Member
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Quota, Refusal, Reservation, Use
from platform_validator.cvm.sampling import UsageSampler
from platform_validator.cvm.session import CvmSession, ValuesHandler
from platform_validator.cvm.sessions import SessionMaker
from platform_validator.cvm.sweeping import Sweeper
from platform_validator.cvm.usage import VmUsage
from platform_validator.cvm.vmm import VmmUnavailable
from platform_validator.egress.gate import ClosedGate, EgressGate
from platform_validator.host_name import DEFAULT_HOST, HostName
from platform_validator.keyring import Keyring, KeyringBroken
from platform_validator.store.port import Store
from platform_validator.store.records import Purpose, StateIdentity

__all__ = ["Cvm", "CvmView", "Fleet", "FleetRules"]

SWEEP = timedelta(seconds=60)
_BEATS_A_SWEEP = 4
_PORT_TRIES = 5
_GONE_POLLS, _GONE_POLL = 100, 0.1
_STARTING = frozenset({"creating", "booting"})

_log = structlog.get_logger(__name__)


class Fleet:
    """Made once a daemon; `run` must be running before the first boot.

    Args:
        hosts: Where VMs are made.
        store: The journal.
        keyring: Seals launch secrets.
        quota: Gets reservations back.
        policy: Judges handshakes.
        values: Answers values requests.
        clock: Time.
        identity: Names our VMs.
        validator: Our address.
        rules: Levels and URLs.
        sessions: Makes sessions.
        egress: Lets CVMs out; None: nothing goes out.
        new_id: Makes the random part of names, and session ids (UUIDs).
        random_bytes: Makes launch secrets.
        on_orphan: Told of each CVM that nobody held, and where it was found: `start` or `sweep`.
        on_reclaimed: The same, once it is gone.
    """

    def __init__(
        self,
        *,
        hosts: Hosts,
        store: Store,
        keyring: Keyring,
        quota: Quota,
        policy: AttestationPolicy,
        values: ValuesHandler,
        clock: Clock,
        identity: StateIdentity,
        validator: Hotkey,
        rules: FleetRules,
        sessions: SessionMaker = CvmSession,
        egress: EgressGate | None = None,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
        on_orphan: Callable[[str], None] = lambda _where: None,
        on_reclaimed: Callable[[str], None] = lambda _where: None,
    ) -> None:
        self._on_orphan = on_orphan
        self._on_reclaimed = on_reclaimed
        self._orphans: dict[VmName, str] = {}
        self.hosts = hosts
        self._store = store
        self._keyring = keyring
        self._quota = quota
        self._clock = clock
        self._holdings = Holdings(
            hosts=hosts,
            store=store,
            keyring=keyring,
            quota=quota,
            clock=clock,
            prefix=f"pv-{identity.state_id}-",
            new_id=new_id,
            random_bytes=random_bytes,
        )
        self._egress = egress or ClosedGate()
        self._booter = Booter(
            egress=self._egress,
            hosts=hosts,
            store=store,
            policy=policy,
            values=values,
            clock=clock,
            validator=validator,
            rules=rules,
            sessions=sessions,
        )
        self._tasks: asyncio.TaskGroup | None = None
        self.destroyer = Destroyer(hosts=hosts, store=store, clock=clock, on_gone=self._gone)
        self._sweeper = Sweeper(
            hosts=hosts,
            store=store,
            clock=clock,
            state_id=identity.state_id,
            held=lambda: self.held().keys() | self.destroyer.names,
            destroy=self._reclaim_swept,
        )
        self._booter.on_refused = self._refused
        self.on_refused: Callable[[str, AttestationRefused], None] = lambda _key, _error: None
        self.beat: Callable[[], None] = lambda: None
        self.sampler = UsageSampler(hosts=hosts, held=self.held, clock=clock, every=rules.sample_every)
        self.keeper = HostKeeper(
            hosts=hosts,
            store=store,
            clock=clock,
            destroyer=self.destroyer,
            sweeper=self._sweeper,
            held=self.held,
            alive=rules.alive,
        )

    @property
    def running(self) -> bool:
        """Whether CVMs can be booted: `run` has begun."""
        return self._tasks is not None

    async def restore(self) -> None:
        """At start: hold quota and ports for every CVM of the journal that is not confirmed gone.

        Raises:
            StoreUnavailable: The journal cannot be read.
        """
        self.hosts.drained(await self._store.drained_hosts())
        self._holdings.restore(await self._store.open_vms())

    async def run(self) -> None:
        """Destruction, the looks at hosts, and the sweep, at once and then periodically, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = self.keeper.tasks = tasks
            tasks.create_task(self.destroyer.run())
            tasks.create_task(self.hosts.watch())
            tasks.create_task(self.sampler.run())
            try:
                while True:
                    await self.sweep()
                    for _ in range(_BEATS_A_SWEEP):
                        await self._clock.sleep(SWEEP.total_seconds() / _BEATS_A_SWEEP)
                        self.beat()
            finally:
                # A group that ends takes no more tasks.
                self.keeper.tasks = None

    async def boot(
        self,
        plan: CvmPlan,
        *,
        purpose: Purpose,
        reservation: Reservation,
        claim_id: ClaimId | None,
        on_stage: Callable[[str], None],
    ) -> Cvm:
        """Make a CVM and wait until the SDK inside is attested, configured and ready.

        The reservation belongs to the CVM from the call on: it comes back when the CVM is gone.

        Raises:
            NoCapacity: The VMM, or our range of host ports, has no room.
            CreateFailed: The VMM refused.
            BootFailed: It did not come up; BootTimedOut: in time.
            AttestationRefused: The policy refused it.
            AttestationUnavailable: It could not be judged.
            SessionRefused: The SDK refused.
            SessionLost: It broke off.
            VmmUnavailable: The VMM does not answer.
            StoreUnavailable: The journal cannot be written; what was made is on its way out.
        """
        tasks = self._tasks
        if tasks is None:
            self._quota.release(reservation)
            raise SessionLost("the fleet is not running")
        for _ in range(_PORT_TRIES):
            member, secret = await self._holdings.intend(plan, purpose, reservation, claim_id)
            name, host = member.record.name, member.record.host
            try:
                cvm = await self._booter.boot(member, plan, secret, tasks=tasks, on_stage=on_stage)
            except (CreateFailed, BootFailed) as error:
                self.destroy(name, reason=str(error))
                if not is_port_conflict(error):
                    self.keeper.judge(host, error)
                    raise
                _log.info("host_port_in_use", vm=name, port=member.record.host_port)
            except BaseException as error:
                self.destroy(name, reason=str(error) or type(error).__name__)
                self.keeper.judge(host, error)
                raise
            else:
                self.hosts.made(host)
                if purpose is Purpose.READY:
                    self._quota.reassign(reservation, Use.READY)
                return cvm
            finally:
                self._quota.tried(reservation)
            # The one being destroyed keeps its share until it is gone; the next try takes that or another.
            await self._until_gone(name)
            again = self._quota.reserve(plan.resources, owner=name, image=plan.image)
            if isinstance(again, Refusal):
                raise NoCapacity(f"a host port was in use, and for another try there is no room: {again}")
            reservation = again
        self._quota.release(reservation)
        raise NoCapacity(f"no host port was free in {_PORT_TRIES} tries")

    async def adopt(self, name: VmName, plan: CvmPlan) -> Cvm:
        """Take over a CVM that an earlier process left running, and resume its session.

        It keeps its reservation and its port. When this raises, it is on its way out.

        Raises:
            SessionLost: It is gone, rebooted, or its session cannot be resumed.
            BootFailed: The VMM says that it ended.
            AttestationRefused: It shows something else than it did.
            AttestationUnavailable: It could not be judged.
            SessionRefused: The SDK refused.
            VmmUnavailable: The VMM does not answer.
        """
        member, tasks = self._holdings.restored(name), self._tasks
        if member is None or tasks is None or name in self.destroyer.names:
            raise SessionLost(f"{name} is not held any more")
        try:
            member.secret = self._keyring.open(member.record.sealed_secret, name.encode())
            member.plan = plan
            return await self._booter.adopt(member, plan, member.secret, tasks=tasks)
        except BaseException as error:
            self.destroy(name, reason=str(error) or type(error).__name__)
            if isinstance(error, KeyringBroken):
                raise SessionLost(f"the launch secret of {name} cannot be read: {error}") from error
            raise

    def destroy(self, name: VmName, reason: str | None = None, *, host: HostName = DEFAULT_HOST) -> None:
        """Hand a CVM to destruction. Never waits; doing it twice changes nothing.

        `host` is where one is that the fleet does not hold any more.
        """
        member = self._holdings.get(name)
        if member is not None:
            member.stage, host = "destroying", member.record.host
            self._egress.forget(name)
            if member.session is not None:
                member.session.close()
        self.destroyer.give(name, reason, host=host)

    def reclaim(self, name: VmName, *, where: str, host: HostName = DEFAULT_HOST) -> None:
        """Have a CVM of ours destroyed that nobody holds. Told again, it is the same one."""
        if name not in self._orphans:
            self._orphans[name] = where
            self._on_orphan(where)
        self.destroy(name, reason=f"reclaimed: {where}", host=host)

    async def reclaim_strays(self, names: Collection[VmName]) -> list[VmName]:
        """Have VMs destroyed that carry our state id and are not in our journal: the operator names them.

        Returns:
            Those of the names that are strays, as of a look at the VMM now.

        Raises:
            VmmError: It cannot be looked at.
        """
        await self.sweep()
        strays = self._sweeper.strays
        wanted = [name for name in sorted(strays) if name in names]
        if self.last_error is not None and len(wanted) < len(set(names)):
            raise VmmUnavailable(self.last_error)
        for name in wanted:
            _log.warning("stray_reclaimed", vm=name)
            self.destroyer.give(name, "reclaimed by the operator", host=strays[name], journaled=False)
        return wanted

    @property
    def strays(self) -> tuple[VmName, ...]:
        """VMs with our state id that our journal does not know, on all hosts."""
        return tuple(sorted(self._sweeper.strays))

    @property
    def last_error(self) -> str | None:
        """Why the last sweep was not complete, or None."""
        return self._sweeper.error

    async def trouble(self, name: VmName) -> str | None:
        """Why a CVM's host cannot be relied on: it is asked now. None: its VMM answers."""
        return await self.keeper.trouble(name)

    async def usage(self, name: VmName) -> VmUsage | None:
        """What a CVM used so far: its VMM is asked once more, for two seconds at most. None: not known."""
        return await self.sampler.last(name)

    def assigned(self, name: VmName) -> None:
        """A ready CVM is a job's now, as the journal says already."""
        self._holdings.use(name, Use.JOB)

    def views(self) -> list[CvmView]:
        """Every CVM that is not gone."""
        doomed = {one.name: one for one in self.destroyer.views()}
        return [
            member.view(doomed.get(name), self.sampler.of(name), self._egress.use(name))
            for name, member in self.held().items()
        ]

    def may_fetch_bundle(self, authorization: str, sha256: str) -> bool:
        """Whether the header is one of a CVM that is creating or booting, for the bundle of its own plan."""
        name = bundle_vm(authorization)
        member = self._holdings.made(name) if name is not None else None
        if member is None or member.secret is None or member.plan is None:
            return False
        if member.stage not in _STARTING or member.plan.bundle_sha256 != sha256:
            return False
        return check_bundle_authorization(authorization, member.secret, member.record.name, sha256)

    async def sweep(self) -> None:
        """Compare journal and VMMs once; never raises for what a VMM or the store cannot do now."""
        await self._sweeper.sweep()

    def held(self) -> dict[VmName, Member]:
        """Every CVM that is not gone, those on their way out with them."""
        return self._holdings.all()

    def _reclaim_swept(self, name: VmName, host: HostName) -> None:
        _log.warning("cvm_reclaimed", vm=name, host=host)
        self.reclaim(name, where="sweep", host=host)

    async def _until_gone(self, name: VmName) -> None:
        for _ in range(_GONE_POLLS):
            if name not in self.destroyer.names:
                return
            await self._clock.sleep(_GONE_POLL)

    def _refused(self, instance_key: str, error: AttestationRefused) -> None:
        self.on_refused(instance_key, error)

    def _gone(self, name: VmName) -> None:
        where = self._orphans.pop(name, None)
        if where is not None:
            self._on_reclaimed(where)
        self._egress.gone(name)
        self._holdings.gone(name)
