"""A fleet in memory: journals, boots and destroys as the real one, with guests that are told what to do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from platform_protocol.ids import ClaimId, JobId, VmId, VmName
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_validator.clock import Clock
from platform_validator.cvm.errors import CvmError, SessionLost
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Quota, Reservation, Use
from platform_validator.cvm.session import GuestResult, JobOrder
from platform_validator.cvm.usage import VmUsage
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import Purpose, VmPhase, VmRecord

Work = Callable[["MemorySession", JobOrder, Path | None], Awaitable[GuestResult]]


class MemorySession:
    """A session whose other side is a coroutine function.

    `started`, `progress` and `log` are that function's way to speak before it answers.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.started: Callable[[bool], None] = lambda _already: None
        self.progress: Callable[[float, str], None] = lambda _percent, _message: None
        self.log: Callable[[str, str], None] = lambda _level, _message: None
        self.dead = False
        self.ended = asyncio.Event()
        self.answers: int | None = None
        """How many more times it answers; None: as long as it lives."""
        self.cancelled: list[tuple[JobId, str]] = []
        self.acknowledged: list[GuestResult] = []

    async def execute(
        self,
        order: JobOrder,
        submission: Path | None,
        *,
        on_started: Callable[[bool], None],
        on_progress: Callable[[float, str], None],
        on_log: Callable[[str, str], None],
    ) -> GuestResult:
        """Have the work done."""
        self.started, self.progress, self.log = on_started, on_progress, on_log
        return await self._work(self, order, submission)

    async def cancel(self, job_id: JobId, reason: str) -> None:
        """Note it."""
        self.cancelled.append((job_id, reason))

    async def confirm(self) -> None:
        """It lives, unless told otherwise."""
        if self.dead or self.answers == 0:
            raise SessionLost("the guest is dead")
        if self.answers is not None:
            self.answers -= 1

    async def acknowledge(self, result: GuestResult) -> None:
        """Note it."""
        self.acknowledged.append(result)

    async def lost(self) -> Exception:
        """Wait until it has ended: by `die`, or because its CVM is destroyed."""
        await self.ended.wait()
        return SessionLost("the guest is dead")

    def die(self) -> None:
        """The CVM ends by itself."""
        self.dead = True
        self.ended.set()


@dataclass(slots=True)
class MemoryCvm:
    """A CVM that is a session and a name."""

    name: VmName
    plan: CvmPlan
    session: MemorySession
    attestation: AttestationKind = AttestationKind.NONE
    isolation_level: IsolationLevel = IsolationLevel.CONTAINER
    os_image: str | None = None


@dataclass(slots=True)
class _Boot:
    error: CvmError | None = None
    until: asyncio.Event | None = None
    answers: int | None = None


@dataclass(slots=True)
class MemoryFleet:
    """Boots at once, unless told to fail or to wait, and destroys when `destroyed` is let happen.

    Args:
        store: Journals the CVMs.
        quota: Gets reservations back when their CVM is gone.
        clock: For the journal.
        work: What every guest does with a job.
        numbers: In the names of its CVMs; a later process on the same journal begins with another.
    """

    store: Store
    quota: Quota
    clock: Clock
    work: Work
    boots: list[_Boot] = field(default_factory=list)
    alive: dict[VmName, MemoryCvm] = field(default_factory=dict)
    destroyed: list[VmName] = field(default_factory=list)
    host_trouble: str | None = None
    used: VmUsage | None = None
    booted: list[MemoryCvm] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _held: dict[VmName, Reservation] = field(default_factory=dict)
    _work_to_do: asyncio.Event = field(default_factory=asyncio.Event)

    def next_boot(
        self,
        *,
        error: CvmError | None = None,
        until: asyncio.Event | None = None,
        answers: int | None = None,
    ) -> None:
        """The next boot fails, or waits for an event; or its guest answers only so many times."""
        self.boots.append(_Boot(error, until, answers))

    async def boot(
        self,
        plan: CvmPlan,
        *,
        purpose: Purpose,
        reservation: Reservation,
        claim_id: ClaimId | None,
        on_stage: Callable[[str], None],
    ) -> MemoryCvm:
        """Journal, boot, attest."""
        name = VmName(f"pv-0123456789-{next(self.numbers):08d}")
        self._held[name] = reservation
        cvm = MemoryCvm(name, plan, MemorySession(self.work))
        self.alive[name] = cvm
        try:
            await self.store.intend_vm(self._record(cvm, purpose, claim_id))
            on_stage("creating")
            await self.store.vm_created(name, VmId(f"id-{name}"))
            on_stage("booting")
            await self._told(cvm)
            on_stage("attesting")
            await self.store.vm_attested(name, attestation="none", vm_instance=None)
            await self.store.vm_phase(name, VmPhase.READY, at=self.clock.now())
        except BaseException:
            self.destroy(name)
            raise
        self.booted.append(cvm)
        return cvm

    async def adopt(self, name: VmName, plan: CvmPlan) -> MemoryCvm:
        """The one of that name, if it is alive."""
        del plan
        cvm = self.alive.get(name)
        if cvm is None:
            raise SessionLost(f"{name} is gone")
        return cvm

    async def trouble(self, name: VmName) -> str | None:
        """What the test says."""
        del name
        return self.host_trouble

    async def usage(self, name: VmName) -> VmUsage | None:
        """What the test says."""
        del name
        return self.used

    def assigned(self, name: VmName) -> None:
        """Account for it."""
        self.quota.reassign(self._held[name], Use.JOB)

    def reclaim(self, name: VmName, *, where: str) -> None:
        """One that nobody holds; where it was found is not counted here."""
        del where
        self.destroy(name)

    def destroy(self, name: VmName) -> None:
        """Hand it to `run`; more calls change nothing."""
        cvm = self.alive.pop(name, None)
        if cvm is not None:
            cvm.session.ended.set()
        if cvm is not None or name not in self.destroyed:
            self.destroyed.append(name)
            self._work_to_do.set()

    async def run(self) -> None:
        """Confirm what was destroyed, and give its reservation back."""
        while True:
            await self._work_to_do.wait()
            self._work_to_do.clear()
            try:
                for name in self.destroyed:
                    await self._confirm(name)
            except StoreUnavailable:
                self._work_to_do.set()
                await self.clock.sleep(1)

    async def _confirm(self, name: VmName) -> None:
        if await self.store.vm(name) is not None:
            await self.store.vm_phase(name, VmPhase.GONE, at=self.clock.now())
        reservation = self._held.pop(name, None)
        if reservation is not None:
            self.quota.release(reservation)

    async def _told(self, cvm: MemoryCvm) -> None:
        told = self.boots.pop(0) if self.boots else _Boot()
        cvm.session.answers = told.answers
        if told.until is not None:
            await told.until.wait()
        if told.error is not None:
            raise told.error

    def _record(self, cvm: MemoryCvm, purpose: Purpose, claim_id: ClaimId | None) -> VmRecord:
        now = self.clock.now()
        return VmRecord(
            name=cvm.name,
            purpose=purpose,
            challenge_id=cvm.plan.challenge_id,
            instance_key=cvm.plan.instance_key,
            resources=cvm.plan.resources,
            phase=VmPhase.INTENDED,
            sealed_secret=b"",
            compose=cvm.plan.compose,
            host_port=0,
            session_id="",
            intended_at=now,
            hard_deadline=now + timedelta(days=1),
            claim_id=claim_id,
        )
