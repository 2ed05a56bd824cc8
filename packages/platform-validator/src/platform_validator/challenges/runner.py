"""The task of one challenge: brings its instances up, keeps its ready CVMs, switches, drains.

It belongs to this challenge alone, so that a slow or broken one delays no other.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from datetime import timedelta

import structlog

from platform_protocol.ids import ChallengeId
from platform_protocol.platform_messages import ActiveChallenge
from platform_protocol.spec import SpecInvalid, parse_platform_toml
from platform_validator.challenges.instance import ChallengeView, Instance, InstanceRef, instance_key
from platform_validator.challenges.lifecycle import Aside, Fact
from platform_validator.challenges.parts import RunnerParts
from platform_validator.challenges.resolve import Unfit, resolve
from platform_validator.challenges.room import Guest
from platform_validator.challenges.source import FetchedTree, SourceError
from platform_validator.crashpoint import crashpoint
from platform_validator.cvm.errors import AttestationRefused, CvmError, NoCapacity
from platform_validator.cvm.quota import Refusal, Reservation
from platform_validator.cvm.vmm import VmmError
from platform_validator.platform_client.backoff import Backoff
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import InstanceRecord, InstanceState, Purpose

BOOTS_TO_FAIL = 3
LOOK_AGAIN = timedelta(seconds=15)
RETRY = Backoff(timedelta(seconds=10), timedelta(minutes=10))
REFILL_RETRY = timedelta(seconds=2)
READY_FOR = timedelta(hours=12)  # half of what an idle CVM lives at most

_log = structlog.get_logger(__name__)


class ChallengeRunner:
    """One challenge: at most one serving instance, one candidate, and old ones that finish their jobs."""

    def __init__(self, challenge_id: ChallengeId, parts: RunnerParts) -> None:
        self._id = challenge_id
        self._parts = parts
        self._wanted: ActiveChallenge | None = None
        self._name = ""
        self._serving: Instance | None = None
        self._candidate: Instance | None = None
        self._old: list[Instance] = []
        self._changed = asyncio.Event()
        self._bringing: asyncio.Task[None] | None = None
        self._refilling: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        self._refill_at = 0.0
        self._keyed: tuple[ActiveChallenge, tuple[str, str]] | None = None
        self._refusal: tuple[str, AttestationRefused] | None = None

    # What others ask

    def want(self, wanted: ActiveChallenge | None) -> None:
        """The API's list names it so now, or no longer."""
        if wanted is not None:
            self._name = wanted.name
        if wanted != self._wanted:
            self._wanted = wanted
            self.wake()

    def refused(self, key: str, error: AttestationRefused) -> None:
        """A CVM of an instance was refused: if it serves here, it has failed."""
        if self._serving is not None and self._serving.key == key:
            self._refusal = key, error
            self.wake()

    def wake(self) -> None:
        """Look again."""
        self._changed.set()

    @property
    def active(self) -> bool:
        """Whether jobs may be claimed for it."""
        return self._serving is not None and self._serving.state is InstanceState.ACTIVE

    @property
    def ever_active(self) -> bool:
        """Whether an instance has ever served in this process."""
        return self._serving is not None

    def acquire(self) -> InstanceRef | None:
        """A counted reference on the Active instance."""
        serving = self._serving
        if serving is None or not self.active or serving.plan is None or serving.spec is None:
            return None
        return InstanceRef(serving, serving.plan, serving.spec, self.wake, self._parts.clock.monotonic)

    def bundles_in_use(self) -> set[str]:
        """Hashes of the bundles that its instances boot CVMs from."""
        instances = (self._serving, self._candidate, *self._old)
        return {each.plan.bundle_sha256 for each in instances if each is not None and each.plan is not None}

    def oldest_ready(self) -> float | None:
        """Since when (monotonic) the oldest idle ready CVM waits."""
        if self._serving is None or not self._serving.ready:
            return None
        return self._serving.ready[0][0]

    def yield_ready(self) -> None:
        """Destroy the oldest idle ready CVM."""
        if self._serving is not None and self._serving.ready:
            _, cvm = self._serving.ready.pop(0)
            _log.info("ready_cvm_yields", challenge_id=self._id, vm=cvm.name)
            self._parts.fleet.destroy(cvm.name)
            self.wake()

    def view(self) -> ChallengeView:
        """As shown."""
        shown = self._serving or self._candidate or (self._old[-1] if self._old else None)
        return ChallengeView(
            id=self._id,
            name=self._name,
            state=shown.state if shown else InstanceState.CREATED,
            serving=self._serving.view() if self._serving else None,
            candidate=self._candidate.view() if self._candidate else None,
            old=tuple(each.view() for each in self._old),
        )

    # The task

    async def run(self) -> None:
        """Until the challenge has left the list and its last job has ended."""
        try:
            async with asyncio.TaskGroup() as group:
                while not await self._step(group):
                    await self._wait()
        finally:
            self._drop_ready()

    async def _step(self, group: asyncio.TaskGroup) -> bool:
        try:
            await self._retire()
            await self._take_refusal()
            if self._wanted is None:
                await self._withdraw()
                return not self._old and self._candidate is None and self._serving is None
            await self._follow(self._wanted, group)
            self._refill(group)
        except StoreUnavailable as error:
            _log.error("challenge_not_stored", challenge_id=self._id, error=str(error))
            self._retry_at = self._parts.clock.monotonic() + REFILL_RETRY.total_seconds()
        return False

    async def _wait(self) -> None:
        now = self._parts.clock.monotonic()
        waits = [60.0]
        if self._retry_at > now:
            waits.append(self._retry_at - now)
        refilling = self._refilling is not None and not self._refilling.done()
        if self._lacking() > 0 and not refilling:
            # A refill that is under way wakes us at its end.
            waits.append(max(self._refill_at - now, 0.05))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(waits)):
                await self._changed.wait()
        self._changed.clear()

    async def _follow(self, wanted: ActiveChallenge, group: asyncio.TaskGroup) -> None:
        key, digest = self._key_of(wanted)
        if self._candidate is not None and self._candidate.key != key:
            await self._drop_candidate(Fact.SUPERSEDED)
        if self._serving is not None and self._serving.key == key:
            if self._serving.state is InstanceState.FAILED and self._candidate is None:
                # A serving instance that broke is brought up again as its own candidate.
                self._candidate, self._serving = self._serving, None
                self._retry_at = self._parts.clock.monotonic() + RETRY.wait(1, self._parts.rng)
            else:
                return
        if self._candidate is None:
            self._candidate = Instance(self._record(wanted, key, digest), wanted)
            self._retry_at = 0.0
            await self._parts.store.put_instance(self._candidate.record)
            crashpoint("instance_created")
            if self._serving is not None:
                self._serving.record = replace(self._serving.record, superseded_by=key)
                await self._parts.store.put_instance(self._serving.record)
        candidate = self._candidate
        if self._bringing is not None and not self._bringing.done():
            return
        if self._parts.clock.monotonic() < self._retry_at:
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
        await self._tell(candidate, Fact.RETRIED)

    def _key_of(self, wanted: ActiveChallenge) -> tuple[str, str]:
        if self._keyed is None or self._keyed[0] is not wanted:
            self._keyed = wanted, instance_key(wanted)
        return self._keyed[1]

    def _record(self, wanted: ActiveChallenge, key: str, digest: str) -> InstanceRecord:
        return InstanceRecord(
            key=key,
            challenge_id=self._id,
            name=wanted.name,
            repository=wanted.github_repo,
            commit=wanted.github_commit,
            spec_digest=digest,
            state=InstanceState.CREATED,
            since=self._parts.clock.now(),
        )

    async def _bring_up(self, candidate: Instance) -> None:
        """Created to Active, or to Failed with the reason."""
        try:
            await self._provision(candidate)
        except (SourceError, Unfit) as error:
            candidate.lasting = error.lasting
            await self._broke(candidate, f"{error.reason}: {error}")
        except SpecInvalid as error:
            candidate.lasting = True
            await self._broke(candidate, f"platform_toml_invalid: {error}")
        except AttestationRefused as error:
            await self._is_refused(candidate, error)
        except (CvmError, VmmError) as error:
            await self._broke(candidate, str(error))
        except StoreUnavailable as error:
            await self._broke(candidate, f"store_unavailable: {error}")
        finally:
            self.wake()

    async def _provision(self, candidate: Instance) -> None:
        parts, wanted = self._parts, candidate.wanted
        tree = await parts.source.fetch(wanted.github_repo, wanted.github_commit)
        spec = parse_platform_toml(tree.platform_toml)
        candidate.plan = resolve(
            wanted,
            spec,
            key=candidate.key,
            bundle_sha256=tree.bundle_sha256,
            compose_file=await self._compose_file(tree, spec.cvm.compose),
            facts=await parts.vmm.facts(),
            rules=parts.rules,
        )
        candidate.spec = spec
        candidate.record = replace(
            candidate.record, bundle_sha256=tree.bundle_sha256, compose_hash=candidate.plan.compose_hash
        )
        await self._tell(candidate, Fact.FETCHED)
        if spec.execution.cvm == "shared":
            _log.warning("shared_runs_per_job", challenge_id=self._id)
        cvm = await self._boot(candidate, await self._reserve(candidate))
        try:
            # Booted, attested, configured and `ready`: a CVM for one job has thereby been probed.
            await self._tell(candidate, Fact.BOOTED)
            await self._switch(candidate)
        except BaseException:
            parts.fleet.destroy(cvm.name)
            raise
        if spec.execution.ready > 0:
            candidate.ready.append((parts.clock.monotonic(), cvm))
        else:
            parts.fleet.destroy(cvm.name)
        parts.on_ready()

    async def _compose_file(self, tree: FetchedTree, path: str | None) -> str | None:
        if path is None:
            return None
        data = await asyncio.to_thread(self._parts.source.file_of, tree, path)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise SourceError("tree_refused", f"{path} is no UTF-8", lasting=True) from error

    async def _reserve(self, instance: Instance) -> Reservation:
        """A candidate's or first probe's share; idle ready CVMs of others yield to it."""
        if instance.plan is None:
            raise AssertionError("reserved before it was resolved")
        while True:
            answer = self._parts.quota.reserve(instance.plan.resources, owner=instance.key)
            if not isinstance(answer, Refusal):
                return answer
            if self._parts.room.make_room(beside=self._id):
                _log.info("candidate_waits_for_room", challenge_id=self._id, lacking=answer.reason)
            await self._parts.clock.sleep(0.5)

    async def _boot(self, instance: Instance, reservation: Reservation) -> Guest:
        if instance.plan is None:
            raise AssertionError("booted before it was resolved")
        return await self._parts.fleet.boot(
            instance.plan,
            purpose=Purpose.READY,
            reservation=reservation,
            claim_id=None,
            on_stage=lambda stage: _log.debug("ready_cvm_stage", challenge_id=self._id, stage=stage),
        )

    async def _switch(self, candidate: Instance) -> None:
        """The candidate serves and the old one recycles: one store transaction, then both in memory."""
        now = self._parts.clock.now()
        old = self._serving
        new_before, old_before = candidate.record, old.record if old else None
        candidate.told(Fact.PROVED, at=now)
        if old is not None:
            old.told(Fact.SUPERSEDED, at=now)
        try:
            await self._parts.store.switch_instances(candidate.record, old.record if old else None)
            crashpoint("instance_switched")
        except BaseException:
            candidate.record = new_before
            if old is not None and old_before is not None:
                old.record = old_before
            raise
        self._serving, self._candidate = candidate, None
        candidate.boot_failures = 0
        if old is not None:
            self._old.append(old)
            self._destroy_ready(old)
        _log.info("challenge_active", challenge_id=self._id, commit=candidate.record.commit)

    # Ready CVMs

    def _lacking(self) -> int:
        serving = self._serving
        if serving is None or serving.spec is None or serving.state is not InstanceState.ACTIVE:
            return 0
        return max(serving.spec.execution.ready - len(serving.ready), 0)

    def _refill(self, group: asyncio.TaskGroup) -> None:
        parts, serving = self._parts, self._serving
        if serving is None or serving.plan is None:
            return
        oldest = self.oldest_ready()
        if oldest is not None and parts.clock.monotonic() - oldest > READY_FOR.total_seconds():
            self.yield_ready()
        if self._lacking() == 0:
            return
        if self._refilling is not None and not self._refilling.done():
            return
        now = parts.clock.monotonic()
        if now < self._refill_at:
            return
        self._refill_at = now + REFILL_RETRY.total_seconds()
        if not parts.room.may_refill():
            return
        reservation = parts.quota.reserve(serving.plan.resources, owner=serving.key)
        if not isinstance(reservation, Refusal):
            self._refilling = group.create_task(self._boot_another(serving, reservation))

    async def _boot_another(self, instance: Instance, reservation: Reservation) -> None:
        try:
            cvm = await self._boot(instance, reservation)
        except NoCapacity as error:
            _log.info("ready_cvm_has_no_room", challenge_id=self._id, error=str(error))
        except AttestationRefused as error:
            await self._is_refused(instance, error)
        except (CvmError, VmmError, StoreUnavailable) as error:
            instance.boot_failures += 1
            _log.warning(
                "ready_cvm_failed", challenge_id=self._id, error=str(error), in_a_row=instance.boot_failures
            )
            if instance.boot_failures >= BOOTS_TO_FAIL:
                await self._broke(instance, f"{BOOTS_TO_FAIL} failed boots in a row: {error}")
        else:
            instance.boot_failures = 0
            self._refill_at = 0.0
            if instance is self._serving and instance.state is InstanceState.ACTIVE:
                instance.ready.append((self._parts.clock.monotonic(), cvm))
                self._parts.on_ready()
            else:
                self._parts.fleet.destroy(cvm.name)
        finally:
            self.wake()

    def _destroy_ready(self, instance: Instance) -> None:
        while instance.ready:
            _, cvm = instance.ready.pop()
            self._parts.fleet.destroy(cvm.name)

    def _drop_ready(self) -> None:
        for instance in (self._serving, self._candidate, *self._old):
            if instance is not None:
                self._destroy_ready(instance)

    # Ends

    async def _broke(self, instance: Instance, reason: str) -> None:
        instance.told(Fact.BROKE, at=self._parts.clock.now(), reason=reason[:2000])
        self._destroy_ready(instance)
        _log.warning("challenge_failed", challenge_id=self._id, commit=instance.record.commit, reason=reason)
        self._retry_at = self._parts.clock.monotonic() + max(
            1.0, RETRY.wait(instance.record.failures + (3 if instance.lasting else 0), self._parts.rng)
        )
        with contextlib.suppress(StoreUnavailable):
            await self._parts.store.put_instance(instance.record)

    async def _is_refused(self, instance: Instance, error: AttestationRefused) -> None:
        """Failed by attestation: not tried again before policy, images or commit change."""
        if instance.state is InstanceState.FAILED:
            return
        instance.refused_under = await self._parts.standing.now()
        await self._broke(instance, f"attestation_refused: {error.check}: {error.detail}")

    async def _take_refusal(self) -> None:
        refusal, self._refusal = self._refusal, None
        serving = self._serving
        if refusal is not None and serving is not None and serving.key == refusal[0]:
            await self._is_refused(serving, refusal[1])

    async def _tell(self, instance: Instance, fact: Fact) -> None:
        instance.told(fact, at=self._parts.clock.now())
        await self._parts.store.put_instance(instance.record)

    async def _drop_candidate(self, fact: Fact) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is None:
            return
        if self._bringing is not None:
            self._bringing.cancel()
            self._bringing = None
        if candidate.told(fact, at=self._parts.clock.now()) is Aside.FORGOTTEN:
            now = self._parts.clock.now()
            await self._parts.store.remove_instance(candidate.key, at=now, reason=fact.value)
        else:
            self._old.append(candidate)
            await self._parts.store.put_instance(candidate.record)
        self._destroy_ready(candidate)

    async def _withdraw(self) -> None:
        await self._drop_candidate(Fact.REMOVED)
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.told(Fact.REMOVED, at=self._parts.clock.now())
            self._old.append(serving)
            self._destroy_ready(serving)
            await self._parts.store.put_instance(serving.record)
        await self._retire()

    async def _retire(self) -> None:
        for instance in [each for each in self._old if each.users == 0]:
            instance.told(Fact.DRAINED, at=self._parts.clock.now())
            crashpoint("instance_recycled")
            await self._parts.store.remove_instance(instance.key, at=self._parts.clock.now())
            self._old.remove(instance)
            _log.info("instance_gone", challenge_id=self._id, commit=instance.record.commit)
