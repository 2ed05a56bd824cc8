"""A validator at level Tee whose guests show generated quotes under an injected root; all else is real.

The product has no option for another root than Intel's at Tee: the policy is made here, in tests alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tests.attestation import forge
from tests.attestation.evidence import At, World, honest_events, measured, served

from platform_protocol.canonical import sha256_hex
from platform_protocol.ids import ChallengeId, Hotkey, JobId
from platform_protocol.platform_messages import ActiveChallenge, IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.session.messages import JobExecute
from platform_protocol.signing import Keypair
from platform_validator.attestation.checks import Outcomes
from platform_validator.attestation.collateral import CollateralUnavailable
from platform_validator.attestation.collateral_cache import CollateralCache
from platform_validator.attestation.os_image import ImagesFile, Pinned, Shape
from platform_validator.attestation.policy import AttestationPolicy, AttestationRules
from platform_validator.attestation.quote import QuoteChecker
from platform_validator.challenges.source import FetchedTree
from platform_validator.config import load_settings
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import VmmHost
from platform_validator.cvm.memory import IMAGE, Machine, MemoryVmm
from platform_validator.cvm.probe import HttpProbe
from platform_validator.cvm.session import CvmSession
from platform_validator.cvm.testing_guest import GuestScript, Outcome, ScriptedGuest
from platform_validator.cvm.vmm import VmmFacts, VmmImage, VmSpec
from platform_validator.daemon.engine import Engine
from platform_validator.daemon.parts import Outside, make_components, make_values
from platform_validator.daemon.pinning import Pinner
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.jobs.lease import LeaseRules, TaskRenewer
from platform_validator.jobs.receipts import ReceiptMaker
from platform_validator.keyring import Keyring
from platform_validator.platform_client.memory import MemoryPlatform
from platform_validator.platform_client.memory_job import MemoryJob
from platform_validator.store.memory import MemoryStore
from platform_validator.store.records import InstanceState, StateIdentity
from platform_validator.telemetry.metrics import Metrics
from platform_validator.values.keys import MemoryKeys

CHALLENGE = ChallengeId("00000000-0000-4000-8000-0000000000c1")
KEYPAIR = Keypair.from_seed(b"t" * 32)
HOTKEY = KEYPAIR.address
SUBMISSION = b"the miner's own submission"
SHAPE = Shape(1, 256)
_SIZE = Resources(cpu_cores=1, memory_mb=256, disk_mb=512)
_TOML = (
    b'name = "digits"\nversion = "1"\n[cvm]\ncpu_cores = 1\nmemory_mb = 256\ndisk_mb = 512\n'
    b"[execution]\nready = 0\n"
)


@dataclass(slots=True)
class Boot:
    """What a guest is about to show; a lie changes it."""

    report_data: bytes
    events: list[dict[str, Any]]
    td: dict[str, Any] = field(default_factory=dict)
    shown: list[dict[str, Any]] | None = None
    quote: bool = True


Lie = Callable[[Boot], None]


class QuickClock(At):
    """The wall clock is the test's; sleeping is shortened, and pauses pass thirty times as fast."""

    def monotonic(self) -> float:
        return super().monotonic() * 30

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))


class RememberingVmm(MemoryVmm):
    """One that keeps every guest, so that it can be asked afterwards what it was sent."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.guests: list[ScriptedGuest] = []
        self._more: tuple[VmmImage, ...] = ()

    def new_image(self, name: str) -> None:
        """Somebody put another image there."""
        self._more = (VmmImage(name, IsolationLevel.CONTAINER),)

    async def facts(self) -> VmmFacts:
        found = await super().facts()
        return VmmFacts(found.version, (*found.images, *self._more))

    def _boot(self, machine: Machine, after: asyncio.Task[None] | None = None) -> None:
        super()._boot(machine, after)
        if machine.guest is not None:
            self.guests.append(machine.guest)


class Tree:
    """Code that is always there."""

    async def fetch(self, repository: str, commit: str) -> FetchedTree:
        return FetchedTree("b" * 64, Path("/nowhere"), _TOML)

    def file_of(self, tree: FetchedTree, path: str) -> bytes:
        raise NotImplementedError


class TeeHouse:
    """The whole job path. `lie` is told by guests that boot from now on; `None`: they are honest."""

    def __init__(self, folder: Path) -> None:
        self.world = World()
        self.clock = QuickClock(forge.NOW)
        self.lie: Lie | None = None
        self.info: dict[str, Any] | None = None
        self.service_down = False
        self.vmm = RememberingVmm(script=self._script, level=IsolationLevel.TEE)
        self.platform = MemoryPlatform(term=timedelta(minutes=10), now=self.clock.now)
        self.store = MemoryStore(identity=StateIdentity("0123456789", "instance"))
        self.images = ImagesFile(folder / "images.toml")
        td = self.world.td(self.world.events())
        rtmr0, rtmr1, rtmr2, _ = (one.hex() for one in td.rtmrs)
        self.pinned = Pinned(IMAGE, SHAPE, td.mrtd.hex(), rtmr0, rtmr1, rtmr2, "tests")
        root = self.world.pki.root.der
        self.collateral = CollateralCache(fetch=self._fetch, clock=self.clock, folder=folder / "c", root=root)
        self.policy = AttestationPolicy(
            level=IsolationLevel.TEE,
            allow_simulated=False,
            checker=QuoteChecker(collateral=self.collateral, clock=self.clock, root=root),
            rules=AttestationRules(outcomes=Outcomes(tee=True), images=self.images.known),
            collateral=self.collateral,
            clock=self.clock,
        )
        self.engine = self._engine(folder)

    def _engine(self, folder: Path) -> Engine:
        settings = load_settings(
            {"VALIDATOR_HOTKEY": HOTKEY, "PLATFORM_BASE_API": "http://nowhere"},
            flags={"dstack.port_range": "{}-{}".format(*_free_range())},
            folder=folder,
        )
        client, rng, metrics = self.platform.client(), random.Random(7), Metrics()
        probe = HttpProbe(vmm=self.vmm, clock=self.clock)
        outside = Outside(
            clock=self.clock,
            client=client,
            hosts=(VmmHost(DEFAULT_HOST, self.vmm, probe, HostPorts(*settings["dstack.port_range"])),),
            sessions=CvmSession,
            source=Tree(),
            policy=self.policy,
            renewer=TaskRenewer(client=client, clock=self.clock, rules=LeaseRules()),
            rng=rng,
            new_id=lambda: str(uuid.uuid4()),
            random_bytes=lambda count: b"s" * count,
        )
        parts = make_components(
            settings,
            outside,
            validator=Hotkey(HOTKEY),
            store=self.store,
            identity=StateIdentity("0123456789", "instance"),
            keyring=Keyring(b"k" * 32),
            values=make_values(settings, MemoryKeys(), store=self.store, clock=self.clock),
            metrics=metrics,
            cache=folder,
            receipts=ReceiptMaker(KEYPAIR, self.clock),
        )
        self.pinner = Pinner(
            fleet=parts.fleet,
            quota=parts.quota,
            vmm=self.vmm,
            policy=self.policy,
            level=IsolationLevel.TEE,
            runtime=None,
            keep_bundle=sha256_hex,
            clock=self.clock,
            where="unix:/vmm.sock",
        )
        return Engine(
            parts=parts,
            client=client,
            store=self.store,
            clock=self.clock,
            rng=rng,
            metrics=metrics,
            drain_timeout=timedelta(seconds=1),
            extra={"attestation": self.policy.run, "pinning": self.pinner.run},
        )

    def allow(self, boot: timedelta) -> None:
        """How long a boot, and its attestation, may take: white-box, for no setting shortens them."""
        booter = self.engine.parts.fleet._booter
        booter._rules = replace(booter._rules, boot=boot, attest=boot)

    @contextlib.asynccontextmanager
    async def open(self, *, pinned: bool = True) -> AsyncIterator[None]:
        """Run the engine, with one challenge; with `pinned` its image is known."""
        if pinned:
            self.images.add(self.pinned)
        self.publish("a" * 40)
        async with asyncio.timeout(40), self.vmm, asyncio.TaskGroup() as group:
            running = group.create_task(self.engine.run())
            try:
                yield
            finally:
                self.engine.drain("the test is over")
                self.engine.drain("now")
                await asyncio.wait({running}, timeout=20)

    def publish(self, commit: str) -> None:
        """List the challenge at a commit."""
        self.platform.put_challenge(
            ActiveChallenge(
                id=CHALLENGE,
                name="digits",
                status="active",
                github_repo="https://github.com/o/digits",
                github_commit=commit,
                resources=_SIZE,
            )
        )

    async def look_again(self) -> None:
        """The next time for a retry has come, and passed: white-box, for it is minutes away."""
        for runner in self.engine.parts.challenges._runners.values():
            runner._retry_at = 0.0
            runner.wake()
        await asyncio.sleep(0.5)  # time in which it could try, whether or not it does

    def submit(self) -> MemoryJob:
        """A job with a submission."""
        job_id = self.platform.add_job(
            CHALLENGE, submission=SUBMISSION, payload={"question": 1}, timeout_s=60
        )
        return self.platform.jobs[JobId(job_id)]

    async def state(self, state: InstanceState) -> str | None:
        """Wait until the challenge shows a state; its reason."""
        while True:
            for view in self.engine.parts.challenges.views():
                if view.state is state and (view.serving or view.candidate) is not None:
                    return (view.serving or view.candidate).reason  # type: ignore[union-attr] # one of them is
            await asyncio.sleep(0.005)

    def were_sent(self, guests: list[ScriptedGuest]) -> list[object]:
        """Everything of worth that came to them: configuration, orders, bytes of a submission."""
        return [
            one
            for guest in guests
            for one in (*guest.configured, *guest.orders, *([guest._data] if guest._data else []))
        ]

    def _script(self, spec: VmSpec) -> GuestScript:
        compose_hash, instance = sha256_hex(spec.compose), sha256_hex(spec.name.encode())[:40]

        def quote(report_data: bytes) -> tuple[bytes | None, str]:
            boot = Boot(report_data, honest_events(compose_hash, instance))
            if self.lie is not None:
                self.lie(boot)
            if not boot.quote:
                return None, ""
            td = replace(measured(boot.events), **({"report_data": boot.report_data} | boot.td))
            return forge.quote(self.world.pki, td), json.dumps(boot.shown or boot.events)

        return GuestScript(work=_score, quote=quote)

    async def _fetch(self, path: str) -> tuple[bytes, dict[str, str]]:
        if self.service_down:
            raise CollateralUnavailable("no answer from the collateral service")
        found: tuple[bytes, dict[str, str]] = await served(forge.collateral(self.world.pki, info=self.info))(
            path
        )
        return found

    def advance(self, to: datetime) -> None:
        """Put the wall clock forward."""
        self.clock.moment = to


async def _score(_guest: ScriptedGuest, _order: JobExecute, submission: bytes) -> Outcome:
    return {"score": 0.5, "bytes": len(submission)}


def _free_range() -> tuple[int, int]:
    while True:
        first = random.randrange(30_000, 50_000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + 8):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first, first + 7
