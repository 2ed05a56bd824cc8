"""Brings a candidate from its code to a CVM that has proved itself, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Protocol

import structlog

from platform_protocol.spec import ChallengeSpec, SpecInvalid, parse_platform_toml
from platform_validator.challenges.instance import Instance
from platform_validator.challenges.lifecycle import DEADLINES
from platform_validator.challenges.parts import RunnerParts
from platform_validator.challenges.resolve import Unfit, resolve
from platform_validator.challenges.room import Guest
from platform_validator.challenges.source import FetchedTree, SourceError
from platform_validator.challenges.yielding import RoomFacts, Step, next_step
from platform_validator.cvm.errors import BootTimedOut
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Refusal, Reservation, Use
from platform_validator.cvm.vmm import VmmError
from platform_validator.store.records import InstanceState, Purpose

ANSWERS = 3
"""Answers in a row that a candidate's CVM gives before it serves."""
ANSWER_EVERY = timedelta(seconds=0.5)
_LOOK_FOR_ROOM = 0.5

_log = structlog.get_logger(__name__)


class Overdue(SourceError):
    """A state took longer than its deadline."""

    def __init__(self, state: InstanceState) -> None:
        super().__init__("overdue", f"{state.value} took longer than {DEADLINES[state]}")


class Beside(Protocol):
    """What a candidate waits for room beside."""

    @property
    def serving(self) -> Instance | None:
        """The instance that serves."""

    async def drain_serving(self, reason: str) -> None:
        """It takes no more jobs."""


class Provisioner:
    """The steps, for the candidates of all challenges."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts

    async def prepare(self, candidate: Instance) -> None:
        """Fetch its code, read it, and plan its CVMs.

        Raises:
            SourceError: The code cannot be had, or not in time.
            SpecInvalid: Its platform.toml is none.
            Unfit: It cannot run here.
            VmmError: The VMM cannot be asked.
        """
        wanted = candidate.wanted
        try:
            async with asyncio.timeout(_seconds(InstanceState.CREATED)):
                tree = await self._parts.source.fetch(wanted.github_repo, wanted.github_commit)
                spec = parse_platform_toml(tree.platform_toml)
                compose_file = await self._compose_file(tree, spec.cvm.compose)
                plan = await self._plan(candidate, spec, tree, compose_file)
        except TimeoutError as error:
            raise Overdue(InstanceState.CREATED) from error
        candidate.plan, candidate.spec = plan, spec
        candidate.tree, candidate.compose_file = tree, compose_file
        candidate.record = replace(
            candidate.record, bundle_sha256=tree.bundle_sha256, compose_hash=plan.compose_hash
        )

    async def differs(self, serving: Instance) -> bool:
        """Whether its CVMs would be made otherwise now: another image, environment, size, or not at all."""
        if serving.plan is None or serving.spec is None or serving.tree is None:
            return False
        try:
            now = await self._plan(serving, serving.spec, serving.tree, serving.compose_file)
        except Unfit:
            return True
        except VmmError:
            # What cannot be asked for has not changed.
            return False
        return now != serving.plan

    async def find_room(self, candidate: Instance, beside: Beside) -> Reservation:
        """Wait for its share: idle ready CVMs yield, and in the end the serving instance is drained first."""
        if candidate.plan is None:
            raise AssertionError("reserved before it was resolved")
        parts, since = self._parts, self._parts.clock.monotonic()
        while True:
            plan = candidate.plan
            answer = parts.quota.reserve(
                plan.resources, owner=candidate.key, image=plan.image, use=Use.CHALLENGE
            )
            if not isinstance(answer, Refusal):
                return answer
            if candidate.waits != str(answer):
                candidate.waits = str(answer)
                _log.info(
                    "candidate_waits_for_room",
                    challenge_id=candidate.record.challenge_id,
                    commit=candidate.record.commit,
                    lacking=candidate.waits,
                )
            serving = beside.serving
            facts = RoomFacts(
                waited_s=parts.clock.monotonic() - since,
                idle=parts.room.make_room(beside=None),
                serving_holds=serving is not None and serving.holds_cvms,
                draining=serving is not None and serving.drained_for is not None,
            )
            if next_step(facts) is Step.DRAIN:
                await beside.drain_serving(f"drained first: no room for both ({answer})")
            await parts.clock.sleep(_LOOK_FOR_ROOM)

    async def boot(
        self, candidate: Instance, reservation: Reservation, booted: Callable[[], object]
    ) -> Guest:
        """Its first CVM; `booted` is called when the SDK inside says that the challenge is imported.

        Raises:
            CvmError: What `CvmFleet.boot` raises.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_seconds(InstanceState.PROVISIONING)) as deadline:

                def entered(stage: str) -> None:
                    if stage == "attesting":
                        deadline.reschedule(loop.time() + _seconds(InstanceState.PROBING))
                        booted()

                return await self.boot_one(candidate, reservation, entered)
        except TimeoutError as error:
            raise BootTimedOut(str(Overdue(candidate.state))) from error

    async def boot_one(
        self, instance: Instance, reservation: Reservation, on_stage: Callable[[str], None]
    ) -> Guest:
        """One CVM of an instance.

        Raises:
            CvmError: What `CvmFleet.boot` raises.
        """
        if instance.plan is None:
            raise AssertionError("booted before it was resolved")
        return await self._parts.fleet.boot(
            instance.plan,
            purpose=Purpose.SHARED if instance.shared else Purpose.READY,
            reservation=reservation,
            claim_id=None,
            on_stage=on_stage,
        )

    async def probe(self, cvm: Guest) -> None:
        """Have it answer so many times in a row, over its attested session.

        Raises:
            SessionLost: It does not.
            BootTimedOut: Not in time.
        """
        try:
            async with asyncio.timeout(_seconds(InstanceState.PROBING)):
                for _ in range(ANSWERS):
                    await cvm.session.confirm()
                    await self._parts.clock.sleep(ANSWER_EVERY.total_seconds())
        except TimeoutError as error:
            raise BootTimedOut(str(Overdue(InstanceState.PROBING))) from error

    async def _plan(
        self, instance: Instance, spec: ChallengeSpec, tree: FetchedTree, compose_file: str | None
    ) -> CvmPlan:
        return resolve(
            instance.wanted,
            spec,
            key=instance.key,
            bundle_sha256=tree.bundle_sha256,
            compose_file=compose_file,
            facts=await self._parts.vmm.facts(),
            rules=self._parts.rules,
            env=await self._parts.env.given(instance.wanted.id, instance.wanted.github_repo),
        )

    async def _compose_file(self, tree: FetchedTree, path: str | None) -> str | None:
        if path is None:
            return None
        data = await asyncio.to_thread(self._parts.source.file_of, tree, path)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise SourceError("tree_refused", f"{path} is no UTF-8", lasting=True) from error


def told(error: Exception) -> tuple[str, bool]:
    """The reason that is shown for a candidate that failed, and whether trying again alone cannot help."""
    if isinstance(error, SourceError | Unfit):
        return f"{error.reason}: {error}", error.lasting
    if isinstance(error, SpecInvalid):
        return f"platform_toml_invalid: {error}", True
    return str(error) or type(error).__name__, False


def _seconds(state: InstanceState) -> float:
    deadline = DEADLINES[state]
    if deadline is None:
        raise AssertionError(f"{state} has no deadline")
    return deadline.total_seconds()
