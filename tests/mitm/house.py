"""One attack in full: guests and the man as processes, and the validator's session through him."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import secrets
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.attestation import forge
from tests.attestation.evidence import IMAGE, SHAPE, At, World, honest_events, measured, served
from tests.mitm import canaries
from tests.mitm.catalogue import CUT_OFF, RELAY
from tests.mitm.guest import Place, serve_old, serve_sdk
from tests.mitm.man import Plan, Report
from tests.mitm.man import main as be_the_man

from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.session.messages import ValuesRequest, ValuesResult
from platform_protocol.session.v2 import Offer
from platform_protocol.user_config import UserConfig
from platform_validator.attestation.collateral_cache import CollateralCache
from platform_validator.attestation.errors import AttestationRefused
from platform_validator.attestation.policy import Accepted, AttestationPolicy, AttestationRules, Expected
from platform_validator.attestation.quote import QuoteChecker
from platform_validator.cvm.connection import Callee, SessionPace
from platform_validator.cvm.session import CvmSession, JobOrder
from platform_validator.errors import ValidatorError

VM = VmName("pv-0123456789-1")
_CHALLENGE = ChallengeId("00000000-0000-4000-8000-0000000000c1")
_PAYLOAD = {"question": canaries.PAYLOAD}
_EXPECTED = {"score": 0.5, "metrics": {"files": 1}, "secret": canaries.RESULT}
_PACE = SessionPace(dial=20, resume_for=20, retry=0.05)
_START = 60.0
_RUN = 60.0
_SETTLE, _GRACE = 10.0, 0.5
_SILENCE = 10.0
"""Seconds after which nothing more is expected in version 1, where nothing is noticed and nothing resumed."""
_FORK = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attack came to.

    Args:
        attack: Its name.
        report: The man's own.
        result: What the validator took for the job's result; None: none.
        why: Why there was none.
        runs: Payloads of the runs in the validator's own guest, and in the others.
    """

    attack: str
    report: Report
    result: dict[str, Any] | None
    why: str
    runs: tuple[list[Any], list[Any]]

    @property
    def reached(self) -> bool:
        """Whether there was a moment for it."""
        return self.attack in (RELAY, CUT_OFF) or self.report.tampered > 0

    @property
    def read(self) -> list[str]:
        """Contents that he read."""
        return canaries.found_in(self.report.seen)

    @property
    def won(self) -> list[str]:
        """What he achieved, of what he must not."""
        own, others = self.runs
        found = {
            "read": bool(self.read),
            "result": self.result not in (None, _EXPECTED),
            "frame": self.report.survived > 0,
            "run": own not in ([], [_PAYLOAD]) or others != [],
        }
        return [name for name, holds in found.items() if holds]


class MitmHouse:
    """Holds what all attacks share: a hierarchy of certificates, and the policies.

    Args:
        folder: For sockets and what guests write.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._world = World()
        clock, root = At(forge.NOW), self._world.pki.root.der
        cache = CollateralCache(fetch=served(forge.collateral(self._world.pki)), clock=clock, root=root)
        self._at_tee = AttestationPolicy(
            level=IsolationLevel.TEE,
            allow_simulated=False,
            checker=QuoteChecker(collateral=cache, clock=clock, root=root),
            rules=AttestationRules(images=self._world.images),
            clock=clock,
        )
        self._below = AttestationPolicy(
            level=IsolationLevel.CONTAINER, allow_simulated=False, checker=None, clock=clock
        )
        _FORK.set_forkserver_preload(["tests.mitm.guest", "tests.mitm.man"])

    async def run(self, attack: str, *, allow_v1: bool = False, old: bool = False) -> Outcome:
        """One attack. `allow_v1`: below Tee, by policy; `old`: the guests speak nothing else."""
        place = self._folder / secrets.token_hex(4)
        place.mkdir()
        own, other = secrets.token_bytes(32), secrets.token_bytes(32)
        async with contextlib.AsyncExitStack() as stack:
            guests = [
                await stack.enter_async_context(self._guest(place / name, VmName(vm), secret, old=old))
                for name, vm, secret in (("own", VM, own), ("other", f"{VM}-other", other), ("twin", VM, own))
                if name == "own" or (name == "other" and "another CVM" in attack) or name in attack
            ]
            ports = {each.runs.parent.name: each.port for each in guests}
            ordered = tuple(ports.get(name, 0) for name in ("own", "other", "twin"))
            plan = Plan(attack, old, free_port(), ordered, other, _GRACE if allow_v1 else _SETTLE)
            ask = await stack.enter_async_context(_man(plan))
            patience = _SILENCE if old and attack != RELAY else _RUN
            async with asyncio.timeout(patience + _START):
                result, why, report = await self._evaluate(
                    place, plan.port, own, ask, allow_v1=allow_v1, patience=patience
                )
            runs = {each.runs.parent.name: _lines(each.runs) for each in guests}
        own_runs = runs.pop("own")
        return Outcome(
            attack, report, result, why, (own_runs, [one for held in runs.values() for one in held])
        )

    async def _evaluate(
        self,
        place: Path,
        port: int,
        secret: bytes,
        ask: Callable[[], Awaitable[Report]],
        *,
        allow_v1: bool,
        patience: float,
    ) -> tuple[dict[str, Any] | None, str, Report]:
        submission = place / "submission"
        submission.write_text(canaries.SUBMISSION)
        digest = hashlib.sha256(submission.read_bytes()).hexdigest()
        found: list[Accepted] = []
        callee = Callee(
            ("127.0.0.1", port), VM, secret, str(uuid.uuid4()), Hotkey("5DDexample"), allow_v1=allow_v1
        )
        session = CvmSession(
            callee,
            challenge_id=_CHALLENGE,
            env={"CANARY": canaries.ENVIRONMENT},
            judge=lambda offer: self._judge(offer, found, allow_v1=allow_v1),
            values=_Values(),
            pace=_PACE,
        )
        order = JobOrder(JobId(str(uuid.uuid4())), 1, _CHALLENGE, None, _PAYLOAD, digest)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(session.run())
            try:
                async with asyncio.timeout(patience):
                    await session.ready()
                    told = await session.execute(
                        order,
                        submission,
                        on_started=lambda _already: None,
                        on_progress=lambda _percent, _message: None,
                        on_log=lambda _level, _message: None,
                    )
                    await session.acknowledge(told)
                result, why = told.result, str(told.error or "")
            except (ValidatorError, TimeoutError) as error:
                result, why = None, f"{type(error).__name__}: {error}"
            report = await ask()
            session.close()
        return result, why, report

    async def _judge(self, offer: Offer, found: list[Accepted], *, allow_v1: bool) -> None:
        """As a booting CVM is judged: by policy; at a resume it must show what it showed at first."""
        expected = Expected(
            self._world.compose_hash, offer.report_data, image=IMAGE, shape=SHAPE, vm_config=offer.vm_config
        )
        policy = self._below if allow_v1 else self._at_tee
        accepted = await policy.judge(offer.quote, offer.event_log, expected)
        if found and accepted != found[0]:
            raise AttestationRefused("instance_id", "a resumed session shows another instance or kind")
        found.append(accepted)

    @contextlib.asynccontextmanager
    async def _guest(self, folder: Path, vm: VmName, secret: bytes, *, old: bool) -> AsyncIterator[Place]:
        folder.mkdir()
        place = Place(free_port(), folder / "agent", folder / "runs", folder)
        config = UserConfig(
            vm=vm,
            launch_secret=UserConfig.encode_secret(secret),
            validator_base_url="http://127.0.0.1:1",
            proxy_url=None,
            max_lifetime_s=600,
            hard_lifetime_s=600,
        )
        instance = hashlib.sha256(str(folder).encode()).hexdigest()[:40]
        agent = await asyncio.start_unix_server(self._agent(instance), str(place.agent))
        process = _FORK.Process(
            target=serve_old if old else serve_sdk, args=(place,) if old else (place, config), daemon=True
        )
        process.start()
        try:
            async with agent:
                async with asyncio.timeout(_START):
                    await _until_served(place.port)
                yield place
        finally:
            process.kill()
            await asyncio.to_thread(process.join)

    def _agent(self, instance: str) -> Callable[..., Awaitable[None]]:
        """The guest agent of dstack: quotes by this world's hardware."""
        events = honest_events(self._world.compose_hash, instance)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length:")[1].split("\r\n")[0])
            asked = bytes.fromhex(json.loads(await reader.readexactly(length))["report_data"])
            td = replace(measured(events), report_data=asked.ljust(64, b"\x00"))
            quote = forge.quote(self._world.pki, td).hex()
            body = json.dumps({"quote": quote, "event_log": json.dumps(events), "vm_config": "{}"}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            await writer.drain()
            writer.close()

        return answer


class _Values:
    """Takes what the challenge writes."""

    async def answer(
        self, challenge_id: ChallengeId, session_id: str, request: ValuesRequest
    ) -> ValuesResult:
        del challenge_id, session_id
        return ValuesResult(request_id=request.request_id, version=1)


@contextlib.asynccontextmanager
async def _man(plan: Plan) -> AsyncIterator[Callable[[], Awaitable[Report]]]:
    """His process; what is yielded asks him for his report."""
    ours, his = _FORK.Pipe()
    process = _FORK.Process(target=be_the_man, args=(plan, his), daemon=True)
    process.start()
    try:
        if await _hear(ours) != "ready":
            raise RuntimeError("expected the man in the middle to say ready")

        async def ask() -> Report:
            ours.send("report")
            said = await _hear(ours)
            if not isinstance(said, Report):
                raise TypeError(f"expected a report, got {said!r}")
            return said

        yield ask
    finally:
        process.kill()
        await asyncio.to_thread(process.join)
        ours.close()


async def _hear(pipe: Connection) -> object:
    if not await asyncio.to_thread(pipe.poll, _START):
        raise TimeoutError("the man in the middle says nothing")
    return pipe.recv()


async def _until_served(port: int) -> None:
    """Until health is answered, or, by a challenge that has none, anything at all."""
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /sdk/health HTTP/1.1\r\nHost: guest\r\n\r\n")
            answered = await reader.read(12)
            writer.close()
            if answered:
                return
        await asyncio.sleep(0.05)


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
