"""The CVMs of one challenge that are up before their jobs: the ready pool, or the one of `shared` mode."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from datetime import timedelta
from typing import Any

import structlog

from platform_protocol.ids import ChallengeId, VmName
from platform_validator.challenges.demand import Demand
from platform_validator.challenges.instance import Instance, Resident
from platform_validator.challenges.parts import RunnerParts
from platform_validator.challenges.provision import Provisioner
from platform_validator.challenges.room import Guest
from platform_validator.cvm.errors import AttestationRefused, CvmError, NoCapacity
from platform_validator.cvm.quota import Reservation, Use
from platform_validator.cvm.vmm import VmmError
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import InstanceState

FAILURES_TO_FAIL = 3
READY_FOR = timedelta(hours=12)
"""Half of what an idle CVM lives at most."""
SHARED_FOR = timedelta(days=6)
"""A day less than it lives at most."""
REFILL_RETRY = timedelta(seconds=2)
_BOOTS_AT_ONCE = 2
_SPARE = 1

_log = structlog.get_logger(__name__)


class Pool:
    """What stands ready for one challenge.

    Args:
        challenge_id: Whose.
        parts: Shared by all challenges.
        broke: Called when an instance cannot be relied on any more, with the reason.
        refused: Called when attestation refuses a CVM of it.
        wake: Called when something changed.
    """

    def __init__(
        self,
        challenge_id: ChallengeId,
        parts: RunnerParts,
        *,
        broke: Callable[[Instance, str], Coroutine[Any, Any, None]],
        refused: Callable[[Instance, AttestationRefused], Awaitable[None]],
        wake: Callable[[], None],
    ) -> None:
        self._id = challenge_id
        self._parts = parts
        self._broke = broke
        self._refused = refused
        self._wake = wake
        self._provisioner = Provisioner(parts)
        self._booting = 0
        self._watching: set[asyncio.Task[None]] = set()
        self._retry_at = 0.0
        self._ended_by_themselves = 0
        self.demand = Demand()
        self.serving: Instance | None = None
        self.tasks: asyncio.TaskGroup | None = None

    def keep(self, instance: Instance, cvm: Guest) -> None:
        """A CVM has proved itself: it stands ready, and is watched until a job takes it."""
        now = self._parts.clock.monotonic()
        if instance.shared:
            before, instance.resident = instance.resident, Resident(cvm, now, now)
            if before is not None:
                self._retire(instance, before)
        elif self._wanted(instance) > 0:
            instance.ready.append((now, cvm))
        else:
            self._parts.fleet.destroy(cvm.name)
            return
        if self.tasks is not None:
            watching = self.tasks.create_task(self._watch(instance, cvm))
            self._watching.add(watching)
            watching.add_done_callback(self._watching.discard)
        self._parts.on_ready()

    def lacking(self) -> int:
        """How many CVMs are to be booted now, those that are booting left out."""
        serving = self.serving
        if serving is None or serving.state is not InstanceState.ACTIVE or serving.drained_for is not None:
            return 0
        if serving.shared:
            resident, now = serving.resident, self._parts.clock.monotonic()
            fresh = resident is not None and now - resident.since < SHARED_FOR.total_seconds()
            return 0 if fresh or self._booting else 1
        return max(self._wanted(serving) - len(serving.ready) - self._booting, 0)

    def refill_in(self) -> float | None:
        """In how many seconds there is something to refill; None: boots that are under way wake us first."""
        if self.lacking() == 0 or self._booting >= _BOOTS_AT_ONCE:
            return None
        return max(self._retry_at - self._parts.clock.monotonic(), 0.05)

    def refill(self, group: asyncio.TaskGroup) -> None:
        """Begin what is lacking, as far as there is room; what stood ready too long goes."""
        parts, serving, now = self._parts, self.serving, self._parts.clock.monotonic()
        if serving is None or serving.plan is None:
            return
        aged = serving.ready and now - serving.ready[0][0] > READY_FOR.total_seconds()
        # One more than is wanted may stay, so that a demand that wavers does not boot and destroy.
        if aged or len(serving.ready) > self._wanted(serving) + _SPARE:
            self.yield_oldest()
        while self.lacking() > 0 and self._booting < _BOOTS_AT_ONCE and now >= self._retry_at:
            reservation = None
            if parts.room.may_refill():
                plan, use = serving.plan, Use.CHALLENGE if serving.shared else Use.READY
                reservation = parts.quota.reserve(
                    plan.resources, owner=serving.key, image=plan.image, use=use
                )
            if not isinstance(reservation, Reservation):
                self._retry_at = now + REFILL_RETRY.total_seconds()
                return
            self._booting += 1
            group.create_task(self._boot_another(serving, reservation))

    def oldest(self) -> float | None:
        """Since when (monotonic) the CVM that would yield first is idle; None: none is."""
        serving = self.serving
        if serving is None:
            return None
        resident = serving.resident
        if resident is not None:
            return resident.idle_since if resident.seats == 0 else None
        return serving.ready[0][0] if serving.ready else None

    def yield_oldest(self) -> None:
        """Destroy the idle CVM that stands longest; the challenge stays Active, and boots another later."""
        serving = self.serving
        if serving is None or self.oldest() is None:
            return
        if serving.resident is not None:
            cvm, serving.resident = serving.resident.cvm, None
        else:
            cvm = serving.ready.pop(0)[1]
        _log.info("ready_cvm_yields", challenge_id=self._id, vm=cvm.name)
        self._parts.fleet.destroy(cvm.name)
        self._wake()

    def let_go(self, names: Collection[VmName]) -> None:
        """Their host is drained or gone: what is idle goes, a shared one with its last job."""
        serving = self.serving
        if serving is None:
            return
        for each in [each for each in serving.ready if each[1].name in names]:
            serving.ready.remove(each)
            self._parts.fleet.destroy(each[1].name)
        resident = serving.resident
        if resident is not None and resident.cvm.name in names:
            serving.resident = None
            self._retire(serving, resident)
        self._wake()

    def clear(self, instance: Instance) -> None:
        """It serves no more: what is idle goes now, a shared CVM with its last job."""
        while instance.ready:
            _, cvm = instance.ready.pop()
            self._parts.fleet.destroy(cvm.name)
        resident, instance.resident = instance.resident, None
        if resident is not None:
            self._retire(instance, resident)

    def _retire(self, instance: Instance, resident: Resident) -> None:
        resident.retired = True
        if resident.seats == 0:
            self._parts.fleet.destroy(resident.cvm.name)
        else:
            instance.leaving.append(resident)

    def end(self) -> None:
        """Watch no longer."""
        for task in self._watching:
            task.cancel()

    # What references tell: see `instance.Landlord`

    def changed(self) -> None:
        """Somebody took or gave back."""
        self._wake()

    def claimed(self) -> None:
        """A job was claimed for what stands ready here."""
        self._ended_by_themselves = 0
        self.demand.claimed(self._parts.clock.monotonic())

    def vacated(self, resident: Resident) -> None:
        """A retired CVM has lost its last job."""
        self._parts.fleet.destroy(resident.cvm.name)

    def condemn(self, instance: Instance, resident: Resident, reason: str) -> None:
        """A shared CVM did not serve a job to its end: no other job is given to it."""
        if instance.resident is resident and self.tasks is not None:
            self.tasks.create_task(self._broke(instance, f"its CVM failed a job: {reason}"))

    def _wanted(self, instance: Instance) -> int:
        if instance.spec is None:
            return 0
        return self.demand.wanted(instance.spec.execution.ready, self._parts.clock.monotonic())

    async def _boot_another(self, instance: Instance, reservation: Reservation) -> None:
        clock = self._parts.clock
        began = clock.monotonic()
        failure: Exception | None = None
        try:
            cvm = await self._provisioner.boot_one(
                instance,
                reservation,
                lambda stage: _log.debug("ready_cvm_stage", challenge_id=self._id, stage=stage),
            )
        except NoCapacity as error:
            _log.info("ready_cvm_has_no_room", challenge_id=self._id, error=str(error))
            self._retry_at = clock.monotonic() + REFILL_RETRY.total_seconds()
        except (CvmError, VmmError, StoreUnavailable) as error:
            failure = error
        else:
            self.demand.booted(clock.monotonic() - began)
            instance.boot_failures = 0
            if instance is self.serving and instance.state is InstanceState.ACTIVE:
                self.keep(instance, cvm)
            else:
                self._parts.fleet.destroy(cvm.name)
        finally:
            self._booting -= 1
            self._wake()
        if failure is not None:
            await self._not_booted(instance, failure)

    async def _not_booted(self, instance: Instance, error: Exception) -> None:
        self._retry_at = self._parts.clock.monotonic() + REFILL_RETRY.total_seconds()
        if isinstance(error, AttestationRefused):
            await self._refused(instance, error)
            return
        if isinstance(error, StoreUnavailable):
            # Our own disk: no fault of the challenge.
            _log.warning("ready_cvm_not_journaled", challenge_id=self._id, error=str(error))
            return
        instance.boot_failures += 1
        _log.warning(
            "ready_cvm_failed", challenge_id=self._id, error=str(error), in_a_row=instance.boot_failures
        )
        if instance.boot_failures >= FAILURES_TO_FAIL:
            await self._broke(instance, f"{FAILURES_TO_FAIL} failed boots in a row: {error}")

    async def _watch(self, instance: Instance, cvm: Guest) -> None:
        """A CVM that ends, or is started anew by its VMM, while nobody looks is noticed."""
        error = await cvm.session.lost()
        resident = instance.resident
        if resident is not None and resident.cvm is cvm:
            await self._broke(instance, f"its CVM ended: {error}")
            return
        idle = [each for each in instance.ready if each[1] is cvm]
        if not idle:
            return
        instance.ready.remove(idle[0])
        self._parts.fleet.destroy(cvm.name)
        self._ended_by_themselves += 1
        _log.warning("ready_cvm_ended", challenge_id=self._id, vm=cvm.name, error=str(error))
        if self._ended_by_themselves >= FAILURES_TO_FAIL:
            await self._broke(instance, f"{FAILURES_TO_FAIL} ready CVMs in a row ended: {error}")
        self._wake()
