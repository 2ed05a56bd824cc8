"""Challenges here: follows the API's list, keeps a task a challenge, and hands out instances."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import timedelta

import structlog

from platform_protocol.ids import ChallengeId, VmName
from platform_protocol.resources import Resources
from platform_protocol.spec import ChallengeSpec
from platform_validator.challenges.environment import EnvSource, NoEnvironments
from platform_validator.challenges.instance import ChallengeView, InstanceRef
from platform_validator.challenges.parts import RunnerParts
from platform_validator.challenges.resolve import HostRules
from platform_validator.challenges.room import CvmFleet, Images
from platform_validator.challenges.runner import ChallengeRunner
from platform_validator.challenges.source import Source
from platform_validator.challenges.standing import Standing
from platform_validator.clock import Clock
from platform_validator.cvm.errors import AttestationRefused
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Quota
from platform_validator.platform_client.port import PlatformClient, PlatformError
from platform_validator.platform_client.retries import TABLE, Kind, asked_for
from platform_validator.store.port import Store, StoreUnavailable
from platform_validator.store.records import InstanceEvent, InstanceRecord, InstanceState

MONITOR_EVERY = timedelta(seconds=60)
HISTORY = 200
"""So many of its newest rows are shown."""
RESTARTED = "the validator was restarted"
_APART = 0.5
"""Seconds between two looks, however many pushes ask for one, and longer when the server asks for it."""
RETRY_AFTER = TABLE[Kind.LIST].pause.first
_YIELDING = 10.0

_log = structlog.get_logger(__name__)


class ChallengeManager:
    """Monitors the list and keeps a runner for each challenge.

    Args:
        client: Gives the list.
        store: Keeps the instances.
        source: Fetches the trees.
        vmm: Says which images it has.
        fleet: Boots and destroys.
        quota: Reserves.
        rules: The operator's side.
        clock: Time.
        rng: Jitter.
        on_active: Called when a challenge became Active or a ready CVM came: jobs may be claimable.
        policy: A fingerprint of the attestation policy in force.
        on_state: Called with each state that an instance enters.
        env: What operators gave to challenges; None: nothing.
    """

    def __init__(
        self,
        *,
        client: PlatformClient,
        store: Store,
        source: Source,
        vmm: Images,
        fleet: CvmFleet,
        quota: Quota,
        rules: HostRules,
        clock: Clock,
        rng: random.Random,
        on_active: Callable[[], None] = lambda: None,
        policy: Callable[[], str] = lambda: "",
        on_state: Callable[[ChallengeId, str], None] = lambda _challenge_id, _state: None,
        env: EnvSource | None = None,
    ) -> None:
        self._client = client
        self._store = store
        self._clock = clock
        self._wake = asyncio.Event()
        self._runners: dict[ChallengeId, ChallengeRunner] = {}
        self._yielding_until = 0.0
        self._yielded_at: int | None = None
        self._last_error: str | None = "not listed yet"
        self._hold_off = 0.0
        self._before: dict[ChallengeId, InstanceRecord] = {}
        self.on_active = on_active
        self.beat: Callable[[], None] = lambda: None
        self._parts = RunnerParts(
            store=store,
            source=source,
            vmm=vmm,
            fleet=fleet,
            quota=quota,
            rules=rules,
            env=env or NoEnvironments(),
            clock=clock,
            rng=rng,
            room=self,
            on_ready=self._ready,
            standing=Standing(policy, vmm),
            on_state=on_state,
        )

    @property
    def last_error(self) -> str | None:
        """Why the list could not be had the last time, or None: shown in /health."""
        return self._last_error

    def wake(self) -> None:
        """Look at the list now (a push hinted at a change)."""
        self._wake.set()

    def env_changed(self, challenge_id: ChallengeId) -> None:
        """An operator gave or took a variable: what waits for it is tried at once."""
        runner = self._runners.get(challenge_id)
        if runner is not None:
            runner.try_again()

    def resize(self, limits: Resources) -> None:
        """Other totals for all CVMs: what Failed for being larger is tried again as for any reason."""
        self._parts.rules = replace(self._parts.rules, limits=limits)

    async def run(self) -> None:
        """Follow the list until cancelled; ready CVMs are handed to destruction at the end."""
        await self._take_over()
        async with asyncio.TaskGroup() as group:
            while True:
                self.beat()
                listed = await self._look(group)
                looked_at = self._clock.monotonic()
                pause = MONITOR_EVERY if listed else RETRY_AFTER
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause.total_seconds()):
                        await self._wake.wait()
                earliest = looked_at + max(_APART, self._hold_off)
                if (left := earliest - self._clock.monotonic()) > 0.0:
                    await self._clock.sleep(left)
                self._wake.clear()

    def active_ids(self) -> Sequence[ChallengeId]:
        """Challenges that jobs may be claimed for."""
        return [each for each, runner in self._runners.items() if runner.active]

    def acquire(self, challenge_id: ChallengeId) -> InstanceRef | None:
        """A counted reference on a challenge's Active instance; None when there is none."""
        runner = self._runners.get(challenge_id)
        return runner.acquire() if runner is not None else None

    def bundles_in_use(self) -> set[str]:
        """Hashes of the bundles that a CVM of an instance may ask for."""
        return {sha256 for runner in self._runners.values() for sha256 in runner.bundles_in_use()}

    def make_room(self, *, beside: ChallengeId | None) -> bool:
        """Have the oldest idle ready CVM of another challenge yield; refills pause until room is taken.

        One at a time: the next yields when the room of the one before has come and was not enough.
        """
        now, cvms = self._clock.monotonic(), self._parts.quota.view().cvms
        if now < self._yielding_until and self._yielded_at is not None and cvms >= self._yielded_at:
            return True
        idle = [
            (since, runner)
            for each, runner in self._runners.items()
            if each != beside and (since := runner.oldest_ready()) is not None
        ]
        self._yielding_until = now + _YIELDING
        self._yielded_at = cvms if idle else None
        if not idle:
            return False
        min(idle, key=lambda each: each[0])[1].yield_ready()
        return True

    def let_go(self, names: Collection[VmName]) -> None:
        """What stands ready among these CVMs goes: their host is drained or gone."""
        for runner in self._runners.values():
            runner.let_go(names)

    def room_taken(self) -> None:
        """Whoever waited for room has it: refills may go on."""
        self._yielding_until = 0.0
        self._yielded_at = None

    def may_refill(self) -> bool:
        """Whether idle ready CVMs may be booted now."""
        return self._clock.monotonic() >= self._yielding_until

    def refused(self, instance_key: str, error: AttestationRefused) -> None:
        """A CVM of that instance was refused by attestation, wherever it was booted."""
        for runner in self._runners.values():
            runner.refused(instance_key, error)

    async def history(self, challenge_id: ChallengeId) -> Sequence[InstanceEvent]:
        """What became of a challenge's instances, newest first.

        Raises:
            StoreUnavailable: The journal cannot be read.
        """
        return await self._store.challenge_history(challenge_id, HISTORY)

    def planned(self, challenge_id: ChallengeId) -> tuple[ChallengeSpec, CvmPlan] | None:
        """What a challenge's CVMs are made of, where that is known."""
        runner = self._runners.get(challenge_id)
        return runner.planned() if runner is not None else None

    def views(self) -> list[ChallengeView]:
        """Every challenge, by name."""
        return sorted((runner.view() for runner in self._runners.values()), key=lambda view: view.name)

    def _ready(self) -> None:
        self.on_active()

    async def _take_over(self) -> None:
        """After an earlier process: what served is brought up again, everything else starts anew.

        Their CVMs are gone or being destroyed. In the journal what served stays Active, with a reason that
        says that it takes no jobs, so that another crash meanwhile does not lose sight of it.
        """
        while True:
            try:
                for record in reversed(await self._store.instances()):
                    await self._take_over_one(record)
            except StoreUnavailable as error:
                _log.error("instances_not_taken_over", error=str(error))
                self.beat()
                await self._clock.sleep(RETRY_AFTER.total_seconds())
            else:
                return

    async def _take_over_one(self, record: InstanceRecord) -> None:
        now = self._clock.now()
        known = self._before.get(record.challenge_id)
        active = record.state is InstanceState.ACTIVE
        # What served, broke, and waited to be brought back has a successor named.
        served = active or (record.state is InstanceState.FAILED and record.superseded_by is not None)
        if served and (known is None or known.key == record.key):
            self._before[record.challenge_id] = record
            if active:
                await self._store.put_instance(replace(record, reason=RESTARTED, since=now))
        else:
            await self._store.remove_instance(record.key, at=now, reason=RESTARTED)

    async def _forget_unlisted(self, wanted: Collection[ChallengeId]) -> None:
        """What served before and is not listed any more."""
        for record in [each for each in self._before.values() if each.challenge_id not in wanted]:
            await self._store.remove_instance(record.key, at=self._clock.now(), reason="no longer listed")
            del self._before[record.challenge_id]

    async def _look(self, group: asyncio.TaskGroup) -> bool:
        try:
            listed = await self._client.active_challenges()
        except PlatformError as error:
            self._last_error = str(error)
            self._hold_off = asked_for(Kind.LIST, error)
            _log.warning("challenges_not_listed", error=str(error))
            return False
        self._last_error, self._hold_off = None, 0.0
        wanted = {challenge.id: challenge for challenge in listed.challenges}
        for challenge_id, challenge in wanted.items():
            runner = self._runner(challenge_id, group)
            runner.want(challenge)
            runner.look_closer()
        for challenge_id, runner in self._runners.items():
            if challenge_id not in wanted:
                runner.want(None)
        try:
            await self._forget_unlisted(wanted)
        except StoreUnavailable as error:
            _log.error("instances_not_forgotten", error=str(error))
        return True

    def _runner(self, challenge_id: ChallengeId, group: asyncio.TaskGroup) -> ChallengeRunner:
        if challenge_id not in self._runners:
            runner = ChallengeRunner(challenge_id, self._parts, self._before.pop(challenge_id, None))
            self._runners[challenge_id] = runner
            group.create_task(self._supervise(challenge_id, runner))
        return self._runners[challenge_id]

    async def _supervise(self, challenge_id: ChallengeId, runner: ChallengeRunner) -> None:
        try:
            await runner.run()
        except Exception:  # noqa: BLE001 - a fault of ours in one challenge must not end the others
            _log.exception("challenge_runner_died", challenge_id=challenge_id)
            await self._clock.sleep(RETRY_AFTER.total_seconds())
        finally:
            del self._runners[challenge_id]
            self._wake.set()
