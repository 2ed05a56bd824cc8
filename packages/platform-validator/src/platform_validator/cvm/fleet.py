"""All CVMs of this validator: boots them, write-ahead, and hands them to destruction."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog

from platform_protocol.compose import SDK_PORT
from platform_protocol.ids import ChallengeId, ClaimId, Hotkey, VmId, VmName
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_protocol.session.v2 import Offer
from platform_protocol.tokens import bundle_vm, check_bundle_authorization
from platform_protocol.user_config import UserConfig
from platform_validator.attestation.policy import Accepted, AttestationPolicy, Expected
from platform_validator.clock import Clock
from platform_validator.cvm.destroyer import Destroyer
from platform_validator.cvm.errors import (
    AttestationRefused,
    BootFailed,
    BootTimedOut,
    CreateFailed,
    CvmError,
    NoCapacity,
    SessionLost,
)
from platform_validator.cvm.host_ports import HostPorts, NoHostPort
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.probe import Probe
from platform_validator.cvm.quota import Quota, Refusal, Reservation
from platform_validator.cvm.reclaim import plan_reclaim
from platform_validator.cvm.session import CvmSession, ValuesHandler
from platform_validator.cvm.vmm import VmmAtCapacity, VmmClient, VmmError, VmmRefused, VmmUnavailable, VmSpec
from platform_validator.keyring import Keyring
from platform_validator.store.port import DuplicateRecord, Store, StoreUnavailable
from platform_validator.store.records import Purpose, StateIdentity, VmPhase, VmRecord

BOOT = timedelta(seconds=300)
ATTEST = timedelta(seconds=60)
SWEEP = timedelta(seconds=60)
_MARGIN = timedelta(hours=1)
_IDLE = timedelta(hours=24)
_HARD = timedelta(days=7)
_PORT_TRIES = 5
_LOOK_AGAIN = 3
_STARTING = frozenset({"creating", "booting"})

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FleetRules:
    """The operator's side. `base_url` is the validator as a CVM reaches it."""

    level: IsolationLevel
    allow_simulated: bool
    base_url: str


@dataclass(frozen=True, slots=True)
class Cvm:
    """A booted, attested and configured CVM."""

    name: VmName
    vm_id: VmId
    plan: CvmPlan
    attestation: AttestationKind
    isolation_level: IsolationLevel
    session: CvmSession


@dataclass(frozen=True, slots=True)
class CvmView:
    """A CVM as status, CLI and pages show it."""

    name: VmName
    challenge_id: ChallengeId
    purpose: Purpose
    stage: str
    attestation: str | None
    since: datetime
    tries: int = 0
    last_error: str | None = None


@dataclass(slots=True)
class _Member:
    """What the fleet holds of one CVM until it is gone."""

    record: VmRecord
    plan: CvmPlan
    secret: bytes = field(repr=False)
    stage: str = "creating"
    session: CvmSession | None = None
    attestation: AttestationKind | None = None


class Fleet:
    """Made once a daemon; `run` must be running before the first boot.

    Args:
        vmm: Makes and removes VMs.
        probe: Waits for a VM to come up.
        store: The journal.
        keyring: Seals launch secrets.
        quota: Gets reservations back.
        ports: Host ports.
        policy: Judges handshakes.
        values: Answers values requests.
        clock: Time.
        identity: Names our VMs.
        validator: Our address.
        rules: Levels and URLs.
    """

    def __init__(
        self,
        *,
        vmm: VmmClient,
        probe: Probe,
        store: Store,
        keyring: Keyring,
        quota: Quota,
        ports: HostPorts,
        policy: AttestationPolicy,
        values: ValuesHandler,
        clock: Clock,
        identity: StateIdentity,
        validator: Hotkey,
        rules: FleetRules,
    ) -> None:
        self._vmm = vmm
        self._probe = probe
        self._store = store
        self._keyring = keyring
        self._quota = quota
        self._ports = ports
        self._policy = policy
        self._values = values
        self._clock = clock
        self._identity = identity
        self._validator = validator
        self._rules = rules
        self._members: dict[VmName, _Member] = {}
        self._reservations: dict[VmName, Reservation] = {}
        self._old_ports: dict[VmName, int] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._levels: dict[str, IsolationLevel] = {}
        self.destroyer = Destroyer(vmm=vmm, store=store, clock=clock, on_gone=self._gone)
        self.strays: tuple[VmName, ...] = ()
        self.last_error: str | None = None

    async def restore(self) -> None:
        """At start: hold quota and ports for every CVM of the journal that is not confirmed gone.

        Raises:
            StoreUnavailable: The journal cannot be read.
        """
        for record in await self._store.open_vms():
            [self._reservations[record.name]] = self._quota.rebuild([(record.name, record.resources)])
            self._ports.hold(record.host_port)
            self._old_ports[record.name] = record.host_port

    async def run(self) -> None:
        """Destruction and the periodic sweep, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            tasks.create_task(self.destroyer.run())
            while True:
                await self._clock.sleep(SWEEP.total_seconds())
                await self._sweep()

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
            StoreUnavailable: The journal cannot be written: nothing was made.
        """
        for _ in range(_PORT_TRIES):
            member = await self._intend(plan, purpose, reservation, claim_id)
            name = member.record.name
            try:
                return await self._boot(member, on_stage)
            except (CreateFailed, BootFailed) as error:
                self.destroy(name, reason=str(error))
                if not _is_port_conflict(error):
                    raise
                _log.info("host_port_in_use", vm=name, port=member.record.host_port)
            except BaseException as error:
                self.destroy(name, reason=str(error) or type(error).__name__)
                raise
            # The one being destroyed keeps its share until it is gone; the next try takes another.
            again = self._quota.reserve(plan.resources, owner=name)
            if isinstance(again, Refusal):
                raise NoCapacity(f"a host port was in use, and for another try there is no room: {again}")
            reservation = again
        self._quota.release(reservation)
        raise NoCapacity(f"no host port was free in {_PORT_TRIES} tries")

    def destroy(self, name: VmName, reason: str | None = None) -> None:
        """Hand a CVM to destruction. Never waits; doing it twice changes nothing."""
        member = self._members.get(name)
        if member is not None:
            member.stage = "destroying"
            if member.session is not None:
                member.session.close()
        self.destroyer.give(name, reason)

    def views(self) -> list[CvmView]:
        """Every CVM that is not gone."""
        doomed = {one.name: one for one in self.destroyer.views()}
        shown = []
        for name, member in self._members.items():
            record, end = member.record, doomed.pop(name, None)
            shown.append(
                CvmView(
                    name,
                    record.challenge_id,
                    record.purpose,
                    member.stage,
                    member.attestation.value if member.attestation else None,
                    record.intended_at,
                    end.tries if end else 0,
                    end.last_error if end else None,
                )
            )
        now = self._clock.now()
        for name, end in doomed.items():
            shown.append(
                CvmView(
                    name, ChallengeId(""), Purpose.JOB, "destroying", None, now, end.tries, end.last_error
                )
            )
        return shown

    def may_fetch_bundle(self, authorization: str, sha256: str) -> bool:
        """Whether the header is one of a CVM that is creating or booting, for the bundle of its own plan."""
        name = bundle_vm(authorization)
        member = self._members.get(name) if name is not None else None
        if member is None or member.stage not in _STARTING or member.plan.bundle_sha256 != sha256:
            return False
        return check_bundle_authorization(authorization, member.secret, member.record.name, sha256)

    # Booting

    async def _intend(
        self, plan: CvmPlan, purpose: Purpose, reservation: Reservation, claim_id: ClaimId | None
    ) -> _Member:
        name = VmName(f"pv-{self._identity.state_id}-{uuid.uuid4()}")
        secret = secrets.token_bytes(32)
        now = self._clock.now()
        try:
            port = self._ports.take()
        except NoHostPort as error:
            self._quota.release(reservation)
            raise NoCapacity(str(error)) from error
        record = VmRecord(
            name=name,
            purpose=purpose,
            challenge_id=plan.challenge_id,
            instance_key=plan.instance_key,
            resources=plan.resources,
            phase=VmPhase.INTENDED,
            sealed_secret=self._keyring.seal(secret, name.encode()),
            compose=plan.compose,
            host_port=port,
            session_id=str(uuid.uuid4()),
            intended_at=now,
            hard_deadline=now + self._lifetimes(plan, purpose)[1],
            claim_id=claim_id,
        )
        try:
            await self._store.intend_vm(record)
        except BaseException:
            self._ports.give_back(port)
            self._quota.release(reservation)
            raise
        member = _Member(record, plan, secret)
        self._members[name] = member
        self._reservations[name] = reservation
        return member

    async def _boot(self, member: _Member, on_stage: Callable[[str], None]) -> Cvm:
        name = member.record.name
        deadline = time.monotonic() + BOOT.total_seconds()
        self._enter(member, "creating", on_stage)
        vm_id = await self._create(member)
        await self._store.vm_created(name, vm_id)
        self._enter(member, "booting", on_stage)
        try:
            async with asyncio.timeout(BOOT.total_seconds()):
                address = await self._probe.until_ready(vm_id)
        except TimeoutError as error:
            raise BootTimedOut(f"{name} was not ready within {BOOT.total_seconds():.0f} s") from error
        self._enter(member, "attesting", on_stage)
        found: list[Accepted] = []
        member.session = session = CvmSession(
            address=address,
            vm=name,
            launch_secret=member.secret,
            session_id=member.record.session_id,
            validator=self._validator,
            challenge_id=member.plan.challenge_id,
            env=member.plan.env,
            judge=lambda offer: self._judge(member, offer, found),
            values=self._values,
        )
        if self._tasks is None:
            raise SessionLost("the fleet is not running")
        self._tasks.create_task(session.run())
        limit = max(ATTEST.total_seconds(), deadline - time.monotonic())
        try:
            async with asyncio.timeout(limit):
                await session.ready()
        except TimeoutError as error:
            raise BootTimedOut(f"{name} was not attested and ready within {limit:.0f} s") from error
        await self._store.vm_phase(name, VmPhase.READY, at=self._clock.now())
        member.stage = "ready"
        return Cvm(name, vm_id, member.plan, found[0].kind, await self._level_of(member.plan.image), session)

    async def _create(self, member: _Member) -> VmId:
        record, plan = member.record, member.plan
        max_lifetime, hard_lifetime = self._lifetimes(plan, record.purpose)
        config = UserConfig(
            vm=record.name,
            launch_secret=UserConfig.encode_secret(member.secret),
            validator_base_url=self._rules.base_url,
            proxy_url=None,
            max_lifetime_s=int(max_lifetime.total_seconds()),
            hard_lifetime_s=int(hard_lifetime.total_seconds()),
        )
        tee = self._rules.level is IsolationLevel.TEE
        spec = VmSpec(
            name=record.name,
            image=plan.image,
            compose=plan.compose,
            user_config=config.model_dump_json(),
            resources=plan.resources,
            host_port=record.host_port,
            guest_port=SDK_PORT,
            tee=tee,
            simulated_tee=self._rules.allow_simulated and not tee,
        )
        try:
            return await self._vmm.create(spec)
        except VmmAtCapacity as error:
            raise NoCapacity(str(error)) from error
        except VmmRefused as error:
            raise CreateFailed(str(error)) from error
        except VmmUnavailable as error:
            # Not idempotent: it may have been made. Its name tells.
            _log.warning("create_unanswered", vm=record.name, reason=str(error))
            for _ in range(_LOOK_AGAIN):
                await self._clock.sleep(1)
                found = [vm for vm in await self._vmm.list(record.name) if vm.name == record.name]
                if found:
                    return found[0].id
            raise

    async def _judge(self, member: _Member, offer: Offer, found: list[Accepted]) -> None:
        expected = Expected(member.plan.compose_hash, offer.report_data)
        accepted = await self._policy.judge(offer.quote, offer.event_log, expected)
        if found:
            if accepted.instance != found[0].instance:
                raise AttestationRefused("instance_id", "a resumed session shows another instance")
            return
        try:
            await self._store.vm_attested(
                member.record.name, attestation=accepted.kind.value, vm_instance=accepted.instance
            )
        except DuplicateRecord as error:
            raise AttestationRefused(
                "instance_id", "another CVM of ours has shown this instance id"
            ) from error
        member.attestation = accepted.kind
        found.append(accepted)

    async def _level_of(self, image: str) -> IsolationLevel:
        if self._rules.level is IsolationLevel.TEE:
            return IsolationLevel.TEE
        if image not in self._levels:
            facts = await self._vmm.facts()
            self._levels |= {one.name: one.level for one in facts.images}
        level = self._levels.get(image, self._rules.level)
        return IsolationLevel.VM if level is IsolationLevel.TEE else level

    def _lifetimes(self, plan: CvmPlan, purpose: Purpose) -> tuple[timedelta, timedelta]:
        if purpose is Purpose.JOB:
            lifetime = plan.timeout + BOOT + _MARGIN
            return lifetime, lifetime
        return _IDLE, _HARD

    def _enter(self, member: _Member, stage: str, on_stage: Callable[[str], None]) -> None:
        member.stage = stage
        on_stage(stage)

    # Ending

    def _gone(self, name: VmName) -> None:
        reservation = self._reservations.pop(name, None)
        if reservation is not None:
            self._quota.release(reservation)
        member = self._members.pop(name, None)
        port = member.record.host_port if member is not None else self._old_ports.pop(name, None)
        if port is not None:
            self._ports.give_back(port)

    async def _sweep(self) -> None:
        try:
            records = await self._store.open_vms()
            seen = {vm.name: vm for vm in await self._vmm.list(f"pv-{self._identity.state_id}-")}
        except (CvmError, VmmError, StoreUnavailable) as error:
            self.last_error = str(error)
            return
        self.last_error = None
        plan = plan_reclaim(
            records,
            seen,
            set(self._members) | self.destroyer.names,
            state_id=self._identity.state_id,
            now=self._clock.now(),
        )
        for name in plan.destroy:
            _log.warning("cvm_reclaimed", vm=name)
            self.destroy(name, reason="reclaimed by the sweep")
        if plan.strays != self.strays:
            _log.warning("vms_not_in_our_journal", vms=plan.strays, remedy="validator cvms reclaim")
            self.strays = plan.strays


def _is_port_conflict(error: Exception) -> bool:
    text = str(error).lower()
    return "port" in text and any(word in text for word in ("conflict", "in use", "forward", "bind"))
