"""The task of one challenge: brings its instances up, keeps its ready CVMs, switches, drains.

It belongs to this challenge alone, so that a slow or broken one delays no other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from datetime import timedelta
from functools import partial

import structlog

from platform_protocol.ids import ChallengeId, VmName
from platform_protocol.platform_messages import ActiveChallenge
from platform_protocol.spec import ChallengeSpec, SpecInvalid
from platform_validator.challenges.aim import Aim
from platform_validator.challenges.chronicle import Chronicle
from platform_validator.challenges.instance import (
    ChallengeView,
    Instance,
    InstanceRef,
    generation_of,
    instance_key,
)
from platform_validator.challenges.lifecycle import RETRY, Aside, Fact
from platform_validator.challenges.parts import RunnerParts
from platform_validator.challenges.pool import REFILL_RETRY, Pool
from platform_validator.challenges.provision import Provisioner, told
from platform_validator.challenges.resolve import Unfit
from platform_validator.challenges.source import SourceError
from platform_validator.challenges.succession import Succession
from platform_validator.crashpoint import crashpoint
from platform_validator.cvm.errors import AttestationRefused, CvmError
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Use
from platform_validator.cvm.vmm import VmmError
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import InstanceRecord, InstanceState

_LOOK = 60.0
_LASTING_STEPS = 3
LOOK_AGAIN = timedelta(seconds=15)

_log = structlog.get_logger(__name__)


class ChallengeRunner:
    """One challenge.

    Args:
        challenge_id: Which.
        parts: Shared by all challenges.
        before: The instance that served when an earlier process ended.
    """

    def __init__(
        self, challenge_id: ChallengeId, parts: RunnerParts, before: InstanceRecord | None = None
    ) -> None:
        self._id = challenge_id
        self._parts = parts
        self._aim = Aim(before)
        self._name = ""
        self._changed = asyncio.Event()
        self._bringing: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        self._look_closer = False
        self._refusal: tuple[str, AttestationRefused] | None = None
        self._chronicle = Chronicle(challenge_id, parts)
        self._provisioner = Provisioner(parts)
        self._pool = Pool(challenge_id, parts, broke=self._broke, refused=self._is_refused, wake=self.wake)
        self._instances = Succession(parts, self._chronicle, self._pool)

    # What others ask

    def want(self, wanted: ActiveChallenge | None) -> None:
        """The API's list names it so now, or no longer."""
        if wanted is not None:
            self._name = wanted.name
        if self._aim.lists(wanted, self._parts.clock.monotonic()):
            self.wake()

    def refused(self, key: str, error: AttestationRefused) -> None:
        """A CVM of an instance was refused: if it serves here, it has failed."""
        serving = self._instances.serving
        if serving is not None and serving.key == key:
            self._refusal = key, error
            self.wake()

    def look_closer(self) -> None:
        """Look whether what the list does not name has changed: image, environment, limits."""
        self._look_closer = True
        self.wake()

    def try_again(self) -> None:
        """Something that a candidate may have failed for has changed: no backoff, and a closer look."""
        self._retry_at = 0.0
        self.look_closer()

    def wake(self) -> None:
        """Look again."""
        self._changed.set()

    @property
    def active(self) -> bool:
        """Whether jobs may be claimed for it."""
        return self._instances.active is not None

    def acquire(self) -> InstanceRef | None:
        """A counted reference on the Active instance."""
        serving = self._instances.active
        if serving is None or serving.plan is None or serving.spec is None:
            return None
        return InstanceRef(serving, serving.plan, serving.spec, self._pool, self._parts.clock.monotonic)

    def bundles_in_use(self) -> set[str]:
        """Hashes of the bundles that its instances boot CVMs from."""
        return {each.plan.bundle_sha256 for each in self._instances if each.plan is not None}

    def oldest_ready(self) -> float | None:
        """Since when (monotonic) the oldest idle ready CVM waits."""
        return self._pool.oldest()

    def yield_ready(self) -> None:
        """Destroy the oldest idle ready CVM."""
        self._pool.yield_oldest()

    def let_go(self, names: Collection[VmName]) -> None:
        """What stands ready among these CVMs goes: their host is drained or gone."""
        self._pool.let_go(names)

    def view(self) -> ChallengeView:
        """As shown."""
        serving, candidate = self._instances.serving, self._instances.candidate
        old = self._instances.leaving.instances
        shown = serving or candidate or (old[-1] if old else None)
        return ChallengeView(
            id=self._id,
            name=self._name,
            state=shown.state if shown else InstanceState.CREATED,
            serving=serving.view() if serving else None,
            candidate=candidate.view() if candidate else None,
            old=tuple(each.view() for each in old),
        )

    def planned(self) -> tuple[ChallengeSpec, CvmPlan] | None:
        """What its serving instance, or else its candidate, is made of; None before that is known."""
        for instance in (self._instances.serving, self._instances.candidate):
            if instance is not None and instance.spec is not None and instance.plan is not None:
                return instance.spec, instance.plan
        return None

    # The task

    async def run(self) -> None:
        """Until the challenge has left the list and its last job has ended."""
        try:
            async with asyncio.TaskGroup() as group:
                self._pool.tasks = group
                while not await self._step(group):
                    await self._wait()
                self._pool.end()
        finally:
            self._pool.tasks = None
            for instance in self._instances:
                self._pool.clear(instance)

    async def _step(self, group: asyncio.TaskGroup) -> bool:
        try:
            await self._instances.leaving.retire()
            await self._take_refusal()
            if self._aim.listed is None:
                await self._withdraw()
                return self._instances.over
            await self._follow(self._aim.listed, group)
            self._pool.refill(group)
        except StoreUnavailable as error:
            _log.error("challenge_not_stored", challenge_id=self._id, error=str(error))
            self._retry_at = self._parts.clock.monotonic() + REFILL_RETRY.total_seconds()
        return False

    async def _wait(self) -> None:
        now = self._parts.clock.monotonic()
        waits = [_LOOK]
        if self._retry_at > now:
            waits.append(self._retry_at - now)
        if self._aim.followed_at > now:
            waits.append(self._aim.followed_at - now)
        refill = self._pool.refill_in()
        if refill is not None:
            waits.append(refill)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(waits)):
                await self._changed.wait()
        self._changed.clear()

    async def _follow(self, listed: ActiveChallenge, group: asyncio.TaskGroup) -> None:
        await self._compare(listed)
        await self._bring_back()
        target = self._aim.target(listed)
        candidate = self._instances.candidate
        if candidate is not None and candidate.key != target.key:
            await self._drop_candidate(Fact.SUPERSEDED)
        serving = self._instances.serving
        if serving is not None and serving.key == target.key:
            return
        now = self._parts.clock.monotonic()
        if self._instances.candidate is None:
            if now < self._aim.followed_at:
                return
            record = self._aim.record(target, self._parts.clock.now())
            await self._begin(Instance(record, target.wanted))
        candidate = self._instances.candidate
        if candidate is None or (self._bringing is not None and not self._bringing.done()):
            return
        if now < self._retry_at:
            return
        if candidate.state is InstanceState.FAILED:
            await self._retry(candidate)
        if candidate.state is InstanceState.CREATED:
            self._bringing = group.create_task(self._bring_up(candidate))

    async def _retry(self, candidate: Instance) -> None:
        """A refusal by attestation stands until something changes that could make it acceptable."""
        if (
            candidate.refused_under is not None
            and await self._parts.standing.now() == candidate.refused_under
        ):
            self._retry_at = self._parts.clock.monotonic() + LOOK_AGAIN.total_seconds()
            return
        candidate.refused_under = None
        await self._chronicle.tell(candidate, Fact.RETRIED)

    async def _bring_back(self) -> None:
        """What served and broke is its own candidate, before anything newer that has failed (I8)."""
        serving, candidate = self._instances.serving, self._instances.candidate
        if serving is None or serving.state is not InstanceState.FAILED:
            return
        if candidate is not None and candidate.state is not InstanceState.FAILED:
            # It may be about to serve.
            return
        await self._drop_candidate(Fact.SUPERSEDED)
        self._instances.bring_back(serving)
        self._aim.broke(serving.record)
        self._retry_at = self._parts.clock.monotonic() + RETRY.wait(1, self._parts.rng)

    async def _compare(self, listed: ActiveChallenge) -> None:
        """Another image, environment or limit is another instance, of the same commit."""
        serving = self._instances.serving
        if not self._look_closer or serving is None:
            return
        self._look_closer = False
        if serving.key != instance_key(listed, serving.generation)[0]:
            return
        differ = await self._provisioner.differs(serving)
        if self._aim.surroundings(serving.generation, differ=differ):
            _log.info("challenge_surroundings_changed", challenge_id=self._id, commit=serving.record.commit)

    async def _begin(self, candidate: Instance) -> None:
        candidate.generation = generation_of(candidate.key)
        if not self._aim.failures(candidate.key):
            # What has not failed yet is tried at once.
            self._retry_at = 0.0
        await self._instances.begin(candidate, self._aim.restores(candidate.key))

    async def _bring_up(self, candidate: Instance) -> None:
        """Created to Active, or to Failed with the reason."""
        try:
            await self._provision(candidate)
        except AttestationRefused as error:
            await self._is_refused(candidate, error)
        except (SourceError, Unfit, SpecInvalid, CvmError, VmmError, StoreUnavailable) as error:
            reason, candidate.lasting = told(error)
            await self._broke(candidate, reason)
        finally:
            candidate.waits = None
            self.wake()

    async def _provision(self, candidate: Instance) -> None:
        provisioner, fleet = self._provisioner, self._parts.fleet
        await provisioner.prepare(candidate)
        reservation = await provisioner.find_room(candidate, self._instances)
        candidate.waits = None
        began = self._parts.clock.monotonic()
        try:
            await self._chronicle.tell(candidate, Fact.FETCHED)
        except BaseException:
            self._parts.quota.release(reservation)
            raise
        crashpoint("instance_fetched")
        booted = partial(self._chronicle.note, candidate, Fact.BOOTED)
        cvm = await provisioner.boot(candidate, reservation, booted)
        try:
            self._pool.demand.booted(self._parts.clock.monotonic() - began)
            await self._chronicle.store(candidate)
            crashpoint("instance_booted")
            await provisioner.probe(cvm)
            await self._instances.switch(candidate)
            self._aim.served()
        except BaseException:
            fleet.destroy(cvm.name)
            raise
        if not candidate.shared:
            self._parts.quota.reassign(reservation, Use.READY)
        self._pool.keep(candidate, cvm)
        self._parts.on_ready()

    # Ends

    async def _broke(self, instance: Instance, reason: str) -> None:
        if self._chronicle.note(instance, Fact.BROKE, reason) is Aside.IGNORED:
            return
        self._pool.clear(instance)
        failures = instance.record.failures + (_LASTING_STEPS if instance.lasting else 0)
        self._retry_at = self._parts.clock.monotonic() + max(1.0, RETRY.wait(failures, self._parts.rng))
        with contextlib.suppress(StoreUnavailable):
            await self._parts.store.put_instance(instance.record)
            crashpoint("instance_failed")
        if instance is self._instances.candidate:
            self._aim.failed(instance.record)
            await self._instances.take_jobs_again()
        self.wake()

    async def _is_refused(self, instance: Instance, error: AttestationRefused) -> None:
        """Failed by attestation: not tried again before policy, images or commit change."""
        if instance.state is InstanceState.FAILED:
            return
        instance.refused_under = await self._parts.standing.now()
        await self._broke(instance, f"attestation_refused: {error.check}: {error.detail}")

    async def _take_refusal(self) -> None:
        refusal, self._refusal = self._refusal, None
        serving = self._instances.serving
        if refusal is not None and serving is not None and serving.key == refusal[0]:
            await self._is_refused(serving, refusal[1])

    async def _drop_candidate(self, fact: Fact) -> None:
        if self._instances.candidate is None:
            return
        cut_short = self._bringing is not None and not self._bringing.done()
        if self._bringing is not None:
            self._bringing.cancel()
        self._bringing = None
        await self._instances.drop_candidate(fact, cut_short=cut_short)

    async def _withdraw(self) -> None:
        await self._drop_candidate(Fact.REMOVED)
        await self._instances.remove_serving()
