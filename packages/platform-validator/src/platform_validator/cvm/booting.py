"""Brings one journaled CVM up: created, booted, attested under the policy, configured, ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import structlog

from platform_protocol.compose import SDK_PORT
from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_protocol.ids import Hotkey, VmId
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_protocol.session import v1
from platform_protocol.session.v2 import Offer
from platform_protocol.user_config import UserConfig
from platform_validator.attestation.os_image import Shape
from platform_validator.attestation.policy import Accepted, AttestationPolicy, Expected
from platform_validator.clock import Clock
from platform_validator.crashpoint import crashpoint
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.errors import (
    AttestationRefused,
    AttestationUnavailable,
    BootTimedOut,
    CreateFailed,
    NoCapacity,
    SessionLost,
)
from platform_validator.cvm.hosts import Hosts, VmmHost
from platform_validator.cvm.members import Cvm, Member
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.session import ValuesHandler
from platform_validator.cvm.sessions import Session, SessionMaker
from platform_validator.cvm.vmm import VmmAtCapacity, VmmError, VmmRefused, VmmUnavailable, VmSpec
from platform_validator.egress.gate import EgressGate
from platform_validator.host_name import HostName
from platform_validator.store.port import DuplicateRecord, Store
from platform_validator.store.records import Purpose, VmPhase

BOOT = timedelta(seconds=300)
ATTEST = timedelta(seconds=60)
_MARGIN = timedelta(hours=1)
_IDLE = timedelta(hours=24)
_HARD = timedelta(days=7)
_LOOK_AGAIN = 3

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FleetRules:
    """The operator's side. `base_url` is the validator as a CVM reaches it.

    `allow_session_v1`: challenges that speak only version 1 of the session are talked to as well.
    `boot` and `attest` are the deadlines of those two stages, `pace` the session's; within `alive` a CVM
    shows that it lives although its VMM is silent. What CVMs use is sampled `sample_every`; None: never.
    """

    level: IsolationLevel
    allow_simulated: bool
    base_url: str
    allow_session_v1: bool = False
    boot: timedelta = BOOT
    attest: timedelta = ATTEST
    alive: timedelta = timedelta(seconds=10)
    pace: SessionPace | None = None
    sample_every: timedelta | None = None
    filesystem: FilesystemPolicy = field(default_factory=FilesystemPolicy)


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """`idle` is renewed by authenticated frames, `hard` never."""

    idle: timedelta
    hard: timedelta


def lifetimes_of(plan: CvmPlan, purpose: Purpose) -> Lifetimes:
    """How long a CVM may run, whatever becomes of the validator."""
    if purpose is Purpose.JOB:
        lifetime = plan.timeout + BOOT + _MARGIN
        return Lifetimes(lifetime, lifetime)
    return Lifetimes(_IDLE, _HARD)


class Booter:
    """Boots members of a fleet. Arguments as `Fleet`'s."""

    def __init__(
        self,
        *,
        hosts: Hosts,
        store: Store,
        policy: AttestationPolicy,
        values: ValuesHandler,
        clock: Clock,
        validator: Hotkey,
        rules: FleetRules,
        sessions: SessionMaker,
        egress: EgressGate,
    ) -> None:
        self._egress = egress
        self._hosts = hosts
        self._sessions = sessions
        self._store = store
        self._policy = policy
        self._values = values
        self._clock = clock
        self._validator = validator
        self._rules = rules
        self._levels: dict[tuple[HostName, str], IsolationLevel] = {}
        self.on_refused: Callable[[str, AttestationRefused], None] = lambda _key, _error: None

    async def boot(
        self,
        member: Member,
        plan: CvmPlan,
        secret: bytes,
        *,
        tasks: asyncio.TaskGroup,
        on_stage: Callable[[str], None],
    ) -> Cvm:
        """See `Fleet.boot`; the member's intent is in the journal, and its end is the caller's affair."""
        name, rules, host = member.record.name, self._rules, self._hosts.get(member.record.host)
        deadline = self._clock.monotonic() + rules.boot.total_seconds()

        def enter(stage: str) -> None:
            member.stage = stage
            on_stage(stage)

        enter("creating")
        vm_id = await self._create(member, plan, secret, host)
        crashpoint("create_sent")
        await self._store.vm_created(name, vm_id)
        crashpoint("id_stored")
        enter("booting")
        crashpoint("booting")
        try:
            async with asyncio.timeout(rules.boot.total_seconds()):
                address = await host.probe.until_ready(vm_id)
        except TimeoutError as error:
            raise BootTimedOut(f"{name} was not ready within {rules.boot.total_seconds():.0f} s") from error
        enter("attesting")
        crashpoint("attesting")
        found: list[Accepted] = []
        session = self._session(member, plan, secret, vm_id, address, found, resume=False)
        tasks.create_task(session.run())
        await self._until_ready(member, session, found, deadline)
        await self._store.vm_phase(name, VmPhase.READY, at=self._clock.now())
        member.stage = "ready"
        level = await self._level_of(plan.image, host)
        return Cvm(name, vm_id, plan, found[0].kind, level, session, found[0].quote, _told(found[0]))

    async def adopt(self, member: Member, plan: CvmPlan, secret: bytes, *, tasks: asyncio.TaskGroup) -> Cvm:
        """See `Fleet.adopt`: the CVM was made, attested and configured by an earlier process."""
        record, limit = member.record, self._rules.attest.total_seconds()
        if record.vm_id is None or record.attestation is None:
            raise SessionLost(f"{record.name} had not come up")
        host = self._hosts.get(record.host)
        self._egress.allow(record.name, secret, plan.network, host=record.host)
        member.stage = "attesting"
        deadline = self._clock.monotonic() + limit
        try:
            async with asyncio.timeout(limit):
                address = await host.probe.until_ready(record.vm_id)
        except TimeoutError as error:
            raise SessionLost(f"{record.name} did not answer within {limit:.0f} s") from error
        found: list[Accepted] = []
        session = self._session(member, plan, secret, record.vm_id, address, found, resume=True)
        tasks.create_task(session.run())
        await self._until_ready(member, session, found, deadline)
        member.stage = "ready"
        level = await self._level_of(plan.image, host)
        return Cvm(record.name, record.vm_id, plan, found[0].kind, level, session, os_image=record.os_image)

    def _session(
        self,
        member: Member,
        plan: CvmPlan,
        secret: bytes,
        vm_id: VmId,
        address: tuple[str, int],
        found: list[Accepted],
        *,
        resume: bool,
    ) -> Session:
        record = member.record
        callee = Callee(
            address, record.name, secret, record.session_id, self._validator, self._rules.allow_session_v1
        )
        member.vm_id = vm_id
        member.session = session = self._sessions(
            callee,
            challenge_id=plan.challenge_id,
            env=plan.env,
            judge=lambda offer: self._judge(member, plan, vm_id, offer, found),
            values=self._values,
            pace=self._rules.pace,
            resume=resume,
        )
        return session

    async def _until_ready(
        self, member: Member, session: Session, found: list[Accepted], deadline: float
    ) -> None:
        limit = max(self._rules.attest.total_seconds(), deadline - self._clock.monotonic())
        try:
            async with asyncio.timeout(limit):
                await session.ready()
        except TimeoutError as error:
            name = member.record.name
            if not found:
                why = self._policy.trouble() or "it showed nothing"
                raise AttestationUnavailable(
                    f"{name} could not be judged within {limit:.0f} s: {why}"
                ) from error
            raise BootTimedOut(f"{name} did not say ready within {limit:.0f} s") from error

    async def _create(self, member: Member, plan: CvmPlan, secret: bytes, host: VmmHost) -> VmId:
        record, rules = member.record, self._rules
        lifetimes = lifetimes_of(plan, record.purpose)
        config = UserConfig(
            vm=record.name,
            launch_secret=UserConfig.encode_secret(secret),
            validator_base_url=host.base_url or rules.base_url,
            # The proxy knows the CVM before there is one.
            proxy_url=self._egress.allow(record.name, secret, plan.network, host=record.host),
            max_lifetime_s=int(lifetimes.idle.total_seconds()),
            hard_lifetime_s=int(lifetimes.hard.total_seconds()),
            filesystem=rules.filesystem,
        )
        tee = rules.level is IsolationLevel.TEE
        spec = VmSpec(
            name=record.name,
            image=plan.image,
            compose=plan.compose,
            user_config=config.model_dump_json(),
            resources=plan.resources,
            host_port=record.host_port,
            guest_port=SDK_PORT,
            tee=tee,
            simulated_tee=rules.allow_simulated and not tee,
        )
        try:
            return await host.vmm.create(spec)
        except VmmAtCapacity as error:
            raise NoCapacity(str(error)) from error
        except VmmRefused as error:
            raise CreateFailed(str(error)) from error
        except VmmUnavailable as error:
            return await self._look_for(host, spec, error)

    async def _look_for(self, host: VmmHost, spec: VmSpec, error: VmmUnavailable) -> VmId:
        """CreateVm is not idempotent, and may have been done all the same: the exact name tells."""
        _log.warning("create_unanswered", vm=spec.name, reason=str(error))
        for _ in range(_LOOK_AGAIN):
            await self._clock.sleep(1)
            try:
                found = [vm for vm in await host.vmm.list(spec.name) if vm.name == spec.name]
            except VmmError:
                continue
            if found:
                return found[0].id
        raise error

    async def _judge(
        self, member: Member, plan: CvmPlan, vm_id: VmId, offer: Offer, found: list[Accepted]
    ) -> None:
        try:
            await self._find(member, plan, vm_id, offer, found)
        except AttestationRefused as error:
            _log.error("cvm_refused", vm=member.record.name, check=error.check, detail=error.detail)
            self.on_refused(plan.instance_key, error)
            raise

    async def _find(
        self, member: Member, plan: CvmPlan, vm_id: VmId, offer: Offer, found: list[Accepted]
    ) -> None:
        accepted = await self._accept(plan, offer)
        record = member.record
        if not found and record.attestation is not None:
            # Judged by an earlier process: it must show what it showed then.
            found.append(Accepted(AttestationKind(record.attestation), record.vm_instance))
            member.attestation = found[0].kind
        if found:
            if accepted != found[0]:
                raise AttestationRefused("instance_id", "a resumed session shows another instance or kind")
            return
        if accepted.instance is not None:
            await self._check_instance(self._hosts.get(record.host), vm_id, accepted.instance)
        try:
            await self._store.vm_attested(
                record.name,
                attestation=accepted.kind.value,
                vm_instance=accepted.instance,
                os_image=_told(accepted),
            )
        except DuplicateRecord as error:
            raise AttestationRefused(
                "instance_id", "another CVM of ours has shown this instance id"
            ) from error
        member.attestation = accepted.kind
        found.append(accepted)

    async def _accept(self, plan: CvmPlan, offer: Offer) -> Accepted:
        if offer.version == v1.VERSION and self._rules.level is not IsolationLevel.TEE:
            # Their development quotes are signed by nobody, and nothing binds version 1's keys to a quote.
            self._policy.heard("version_1", "")
            return Accepted(AttestationKind.NONE, None)
        expected = Expected(
            plan.compose_hash,
            offer.report_data,
            image=plan.image,
            shape=Shape.of(plan.resources),
            vm_config=offer.vm_config,
            pins=plan.pins,
        )
        return await self._policy.judge(offer.quote, offer.event_log, expected)

    async def _check_instance(self, host: VmmHost, vm_id: VmId, shown: str) -> None:
        """The VMM tells a VM's instance late in its boot, or never; what it tells must be the same."""
        try:
            vm = await host.vmm.get(vm_id)
        except VmmError as error:
            raise AttestationUnavailable(f"the VMM cannot be asked for the instance: {error}") from error
        if vm is not None and vm.instance and vm.instance.lower() != shown.lower():
            raise AttestationRefused("instance_id", f"the VMM says {vm.instance[:64]}, the log says {shown}")

    async def _level_of(self, image: str, host: VmmHost) -> IsolationLevel:
        if self._rules.level is IsolationLevel.TEE:
            return IsolationLevel.TEE
        if (host.name, image) not in self._levels:
            facts = await host.vmm.facts()
            self._levels |= {(host.name, one.name): one.level for one in facts.images}
        level = self._levels.get((host.name, image), self._rules.level)
        return IsolationLevel.VM if level is IsolationLevel.TEE else level


def _told(accepted: Accepted) -> str | None:
    return accepted.image.told() if accepted.image is not None else None
