"""Finds out what an OS image boots to at one shape: boots one CVM for it, and destroys it.

Everything else that the policy asks for must hold; only that the image is not known yet is passed over. What
it measures is then believed because this host showed it first, which is why it is called first use.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum

import structlog

from platform_protocol.bundle import TreeEntry, pack
from platform_protocol.compose import app_compose, compose_hash
from platform_protocol.ids import ChallengeId
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.spec import parse_platform_toml
from platform_validator.attestation.os_image import Pinned, Shape
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.challenges.resolve import choose_image, choose_runtime
from platform_validator.challenges.room import Images
from platform_validator.clock import Clock
from platform_validator.cvm.fleet import Cvm, Fleet
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Quota, Refusal, Use
from platform_validator.errors import ValidatorError
from platform_validator.store.records import Purpose
from platform_validator.web.control import PinBusy

PINNING = ChallengeId("00000000-0000-0000-0000-000000000000")
"""Stands for the challenge of a CVM that runs none."""

_DISK_MB = 2048
_BEAT = 15.0
_START_POLL = 0.1
_TOML = b'name = "pinning"\nversion = "1"\nentry = "challenge"\n'
_CODE = b'''"""Booted to see what an OS image measures; no job ever comes."""

from platform_challenge_sdk import challenge


@challenge.on_job()
async def refuse(ctx, payload):
    raise ValueError("this CVM runs no jobs")
'''

_log = structlog.get_logger(__name__)


class PinState(StrEnum):
    """How far it is."""

    NEVER = "never_asked"
    BOOTING = "booting"
    MEASURED = "measured"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Pinning:
    """The last one that was asked for. `pinned` is there when it was measured, `error` when it failed."""

    state: PinState = PinState.NEVER
    image: str = ""
    shape: Shape | None = None
    pinned: Pinned | None = None
    attestation: str | None = None
    tcb_status: str | None = None
    error: str | None = None


class NotMeasured(ValidatorError):
    """It cannot be done here and now."""


class Pinner:
    """One at a time. `run` must be running.

    Args:
        fleet: Boots and destroys.
        quota: Reserves.
        vmm: Says which images there are.
        policy: Judges all but the image.
        level: The least isolation.
        runtime: The operator's runtime for images without a table of their own.
        keep_bundle: Puts a bundle where CVMs fetch it; returns its SHA-256.
        clock: Time.
        where: The VMM, as it is told in the origin.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        quota: Quota,
        vmm: Images,
        policy: AttestationPolicy,
        level: IsolationLevel,
        runtime: str | None,
        keep_bundle: Callable[[bytes], str],
        clock: Clock,
        where: str,
    ) -> None:
        self._fleet = fleet
        self._quota = quota
        self._vmm = vmm
        self._policy = policy
        self._level = level
        self._runtime = runtime
        self._keep_bundle = keep_bundle
        self._clock = clock
        self._where = where
        self._asked = asyncio.Event()
        self.now = Pinning()
        self.beat: Callable[[], None] = lambda: None

    def ask(self, image: str, shape: Shape) -> Pinning:
        """Begin; while the same is under way, only say so.

        Raises:
            PinBusy: Another one is under way.
        """
        if self.now.state is PinState.BOOTING:
            if (self.now.image, self.now.shape) != (image, shape):
                raise PinBusy(f"{self.now.image} at {self.now.shape} is being measured: wait for it")
            return self.now
        self.now = Pinning(PinState.BOOTING, image, shape)
        self._asked.set()
        return self.now

    async def run(self) -> None:
        """Measure what is asked for, until cancelled."""
        while True:
            self.beat()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BEAT):
                    await self._asked.wait()
            if not self._asked.is_set():
                continue
            self._asked.clear()
            async with asyncio.TaskGroup() as group:
                measuring = group.create_task(self._measure(self.now))
                while not measuring.done():
                    self.beat()
                    await asyncio.wait({measuring}, timeout=_BEAT)

    async def _measure(self, asked: Pinning) -> None:
        try:
            if not self._policy.asks_for_quotes:
                raise NotMeasured(
                    f"at level {self._level.value} no quote is asked for: nothing is there to pin"
                )
            while not self._fleet.running:
                await self._clock.sleep(_START_POLL)
            cvm = await self._boot(asked)
        except (ValidatorError, OSError) as error:
            self.now = replace(asked, state=PinState.FAILED, error=str(error)[:2000])
            _log.warning("image_not_measured", image=asked.image, reason=self.now.error)
            return
        self._fleet.destroy(cvm.name)
        self.now = self._found(asked, cvm)
        _log.info("image_measured", image=asked.image, shape=str(asked.shape), state=self.now.state.value)

    def _found(self, asked: Pinning, cvm: Cvm) -> Pinning:
        if cvm.quote is None or asked.shape is None:
            return replace(asked, state=PinState.FAILED, error="it was accepted without a quote")
        body, when = cvm.quote.body, self._clock.now().strftime("%Y-%m-%dT%H:%M:%SZ")
        word = "simulated, " if self._level is not IsolationLevel.TEE else ""
        rtmr0, rtmr1, rtmr2, _ = (register.hex() for register in body.rtmrs)
        pinned = Pinned(
            asked.image,
            asked.shape,
            body.mrtd.hex(),
            rtmr0,
            rtmr1,
            rtmr2,
            f"first use ({word}measured {when} on {self._where}, platform {body.fmspc})",
            first_use=when,
        )
        return replace(
            asked,
            state=PinState.MEASURED,
            pinned=pinned,
            attestation=cvm.attestation.value,
            tcb_status=cvm.quote.status,
        )

    async def _boot(self, asked: Pinning) -> Cvm:
        shape = asked.shape or Shape(1, 1024)
        resources = Resources(
            cpu_cores=shape.cpu, memory_mb=shape.memory_mb, disk_mb=_DISK_MB, gpu_count=shape.gpus
        )
        spec = parse_platform_toml(_TOML)
        image = choose_image((await self._vmm.facts()).images, named=asked.image, level=self._level)
        bundle = self._keep_bundle(
            pack([TreeEntry("challenge.py", data=_CODE), TreeEntry("platform.toml", data=_TOML)])
        )
        runtime = choose_runtime(spec.cvm.runtime, image, self._runtime)
        compose = app_compose(spec, bundle_sha256=bundle, runtime=runtime, compose_file=None)
        reservation = self._quota.reserve(resources, owner="pinning", image=image.name, use=Use.CHALLENGE)
        if isinstance(reservation, Refusal):
            raise NotMeasured(f"no room for {shape}: {reservation.reason}; wait, or raise resource_limits")
        plan = CvmPlan(
            challenge_id=PINNING,
            instance_key="pinning",
            commit="",
            image=image.name,
            compose=compose,
            compose_hash=compose_hash(compose),
            bundle_sha256=bundle,
            resources=resources,
            timeout=timedelta(minutes=1),
            pins=True,
        )
        return await self._fleet.boot(
            plan,
            purpose=Purpose.JOB,
            reservation=reservation,
            claim_id=None,
            on_stage=lambda stage: _log.debug("pinning_stage", stage=stage),
        )
