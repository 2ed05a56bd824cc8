"""One seed's world from its beginning to its end, and what became of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from tests.simulation.faults import strike
from tests.simulation.host import LATEST
from tests.simulation.laws import Laws, Script
from tests.simulation.node import SMALL, Node, settings_for
from tests.simulation.plan import Plan, draw
from tests.simulation.server import Server
from tests.simulation.virtual import NothingLeft, VirtualLoop
from tests.simulation.world import LIFE, Book, Dead, Dice, Life

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.notifications import JobCancelled, NewJob
from platform_protocol.platform_messages import ActiveChallenge, IsolationLevel
from platform_protocol.signing import Keypair
from platform_validator.config import Settings, load_settings
from platform_validator.crashpoint import arm
from platform_validator.store.records import InstanceState

_LONG_JOBS = 0.02
_TIMEOUT_S = 60
_SIZES = {cores: SMALL.model_copy(update={"cpu_cores": cores}) for cores in (1, 2, 3)}
LIVENESS = 6 * 3600.0
"""Virtual seconds after the last fault within which every job must have come to an end."""
_LOOK_EVERY = 10.0
_FAULTS = frozenset({"loop_died", "loop_ended", "job_fault", "session_fault", "challenge_runner_died"})


@dataclass(slots=True)
class Outcome:
    """What one seed's world came to."""

    seed: int
    virtual_s: float = 0.0
    jobs: int = 0
    digest: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    tail: list[str] = field(default_factory=list)


def run_seed(
    seed: int, *, jobs: int = 101, keep: int = 0, plan: Plan | None = None, until: str | None = None
) -> Outcome:
    """Run one seed's world. The same seed gives the same world, event for event.

    Args:
        seed: Of all chance.
        jobs: How many are queued.
        keep: How many of the last events the outcome brings along.
        plan: What goes wrong, instead of what the seed draws.
        until: Once this law is broken, nothing more is waited for.
    """
    _without_collections()
    dice = Dice(seed)
    plan = plan or draw(seed, dice.stream("plan"), jobs=jobs)
    book = Book(keep=keep, until=until)
    _listen_for_faults(book)
    loop = VirtualLoop()
    with tempfile.TemporaryDirectory(prefix="simulation-") as folder:
        try:
            loop.set_exception_handler(lambda _loop, context: _unexpected(book, context))
            world = World(plan, dice, book, Path(folder))
            loop.run_until_complete(world.run())
        except NothingLeft:
            book.found("liveness", "everything waits, and nothing is left that could happen")
        finally:
            arm(None)
            loop.close()
    outcome = Outcome(seed, loop.now, len(plan_jobs(book)), book.digest, book.counts, book.violations)
    outcome.tail, outcome.broken = book.tail, book.broken
    return outcome


def _without_collections() -> None:
    """Cycles are collected between worlds, not within one: a tenth of the time, at some megabytes."""
    if gc.isenabled():
        gc.collect()
        gc.freeze()
        gc.disable()
    else:
        gc.collect()


def plan_jobs(book: Book) -> range:
    """One element a job that was queued."""
    return range(book.counts["queued"])


def _listen_for_faults(book: Book) -> None:
    """What the validator itself calls a fault of its own is one here."""

    def heard(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        life = LIFE.get()
        if event.get("event") in _FAULTS and (life is None or life.alive):
            error = sys.exc_info()[1]
            book.violated("fault", f"{event.get('event')} {event.get('loop', '')}: {error!r}")
        raise structlog.DropEvent

    structlog.reset_defaults()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        processors=[heard],
        cache_logger_on_first_use=False,
    )


def _unexpected(book: Book, context: dict[str, object]) -> None:
    error = context.get("exception")
    if isinstance(error, Dead) or (isinstance(error, BaseExceptionGroup) and error.subgroup(Dead)):
        return
    book.found("fault", f"unhandled: {context.get('message')}: {error!r}")


class World:
    """A Platform API, its validators with their hosts and disks, and what befalls them."""

    def __init__(self, plan: Plan, dice: Dice, book: Book, folder: Path) -> None:
        self._plan = plan
        self._dice = dice
        self._book = book
        self._folder = folder
        self._laws = Laws(book, calm=plan.calm)
        self._chance = dice.stream("world")
        self._challenges: list[ActiveChallenge] = []

    async def run(self) -> None:
        """Begin, let everything happen, heal, wait for every end, drain, and look at what is left."""
        plan, book = self._plan, self._book
        self._server = server = Server(self._laws, plan)
        base = _settings()
        self._nodes = [
            Node(
                number,
                (plan, mine),
                settings_for(base, self._dice.stream(f"settings/{number}")),
                server,
                self._laws,
                self._dice,
                self._folder,
            )
            for number, mine in enumerate(plan.nodes)
        ]
        arm(self._passes)
        self._publish_all()
        async with asyncio.TaskGroup() as group:
            lives = [group.create_task(node.run()) for node in self._nodes]
            self._schedule()
            await asyncio.sleep(max(plan.faults_until, plan.arrive_within) + 1)
            for node in self._nodes:
                node.heal()
            self._mend()
            book.note("healed")
            # What a VMM was asked for long ago may still come.
            await asyncio.sleep(0 if plan.calm else LATEST)
            await self._until("a job came to no end", self._unfinished)
            await self._until("a journal kept something open", self._open)
            for node in self._nodes:
                node.end()
            await asyncio.wait(lives, timeout=3600)
            for task in lives:
                task.cancel()
        if book.until not in book.broken:
            self._judge()

    def _passes(self, name: str) -> None:
        life = LIFE.get()
        if life is not None and life.alive:
            self._nodes[life.node].passes(name)

    # What happens

    def _schedule(self) -> None:
        loop, plan = asyncio.get_running_loop(), self._plan
        for _ in range(plan.jobs):
            loop.call_later(self._chance.uniform(0, plan.arrive_within), self._queue)
        events: list[tuple[float, Callable[[], None]]] = []
        for at, good in plan.updates:
            events.append((at, partial(self._update, good)))
        events += [(at, self._restart_api) for at in plan.api_restarts]
        events += [(at, self._cancel) for at in plan.cancels]
        events += [(at, self._forge) for at in plan.forgeries]
        for node in self._nodes:
            events += [(at, node.kill) for at in node.mine.crashes]
            events += [(at, node.drain) for at in node.mine.drains]
            events += [(at, node.host.meddle) for at in node.mine.meddling]
            events += [(at, node.host.restart_vmm) for at in node.mine.vmm_restarts]
            for window in node.mine.stops:
                events.append((window.begin, partial(node.stop_for, window.lasting)))
            for at, jump in node.mine.wall_jumps:
                events.append((at, partial(self._jump, node, jump)))
        for at, act in events:
            loop.call_later(at, act)

    def _restart_api(self) -> None:
        strike(self._book, "api_restart")
        self._server.restart()

    def _jump(self, node: Node, seconds: float) -> None:
        strike(self._book, "wall_jump")
        node.wall.off += timedelta(seconds=seconds)

    def _publish_all(self) -> None:
        for number in range(self._plan.challenges):
            challenge = ActiveChallenge(
                id=ChallengeId(f"00000000-0000-4000-8000-0000000000c{number}"),
                name=f"challenge-{number}",
                status="active",
                github_repo=f"simulated/challenge-{number}",
                github_commit=self._commit(good=True),
                resources=SMALL,
            )
            self._challenges.append(challenge)
            self._server.put_challenge(challenge)

    def _commit(self, *, good: bool) -> str:
        # In a calm world nothing may go wrong, and a submission that kills a shared CVM harms others.
        mode = self._chance.choice("0000" if self._plan.calm else "0005")
        return ("a" if good else "b") + f"{self._chance.getrandbits(152):038x}" + mode

    def _update(self, good: bool) -> None:
        number = self._chance.randrange(len(self._challenges))
        changed = self._challenges[number].model_copy(update={"github_commit": self._commit(good=good)})
        self._challenges[number] = changed
        self._server.put_challenge(changed)
        strike(self._book, "updated" if good else "updated_broken")
        self._book.note(f"update {number} good={good}")
        if not good:
            serves = [(node, self._serves(node, changed.id)) for node in self._nodes]
            serving = [(node, node.life, key) for node, key in serves if key]
            loop = asyncio.get_running_loop()
            loop.call_later(30, self._still_serve, serving, changed)

    def _mend(self) -> None:
        """Whoever published a version that cannot be had publishes a good one."""
        for number, challenge in enumerate(self._challenges):
            if challenge.github_commit.startswith("b"):
                mended = challenge.model_copy(update={"github_commit": self._commit(good=True)})
                self._challenges[number] = mended
                self._server.put_challenge(mended)

    def _serves(self, node: Node, challenge_id: ChallengeId) -> str | None:
        """The key of the instance that jobs are claimed for."""
        engine = node.engine
        if engine is None or not node.life.alive or engine.phase != "running":
            return None
        ref = engine.parts.challenges.acquire(challenge_id)
        if ref is None:
            return None
        ref.release()
        return ref.key

    def _still_serve(self, serving: list[tuple[Node, Life, str]], challenge: ActiveChallenge) -> None:
        """I8: a version that cannot be had does not end the one that serves; only its own CVMs may."""
        if challenge not in self._challenges:
            return
        for node, life, key in serving:
            if node.life is not life or not node.life.alive or node.engine is None:
                continue
            if (
                node.engine.phase == "running"
                and self._serves(node, challenge.id) != key
                and not _broke(node, key)
            ):
                self._book.violated("I8", f"validator {node.number} gave a running version up")

    def _queue(self) -> None:
        chance = self._chance
        does = chance.choices(("score", "error", "hang", "kill"), (80, 10, 4, 2))[0]
        score = round(chance.random(), 3) if does == "score" else 0.0
        # Some run for longer than a term: without renewals they would not come to their end.
        lasts = 200.0 if chance.random() < _LONG_JOBS else chance.choice((0.5, 2.0, 5.0, 20.0, 45.0))
        script = Script(does, score, lasts)
        challenge = chance.choice(self._challenges)
        job_id = self._server.add_job(
            challenge.id,
            submission=b"code" if chance.random() < 0.2 else None,
            priority=chance.choice((0, 0, 0, 5)),
            timeout_s=300 if lasts > _TIMEOUT_S else _TIMEOUT_S,
            resources=_SIZES[chance.choice((1, 1, 1, 2, 3))],
            push=False,
        )
        self._laws.scripts[job_id] = script
        self._book.counts["queued"] += 1
        self._server.announce(job_id)

    def _cancel(self) -> None:
        running = [job.id for job in self._server.jobs.values() if job.status in {"pending", "claimed"}]
        if running:
            strike(self._book, "cancelled")
            job_id = self._chance.choice(running)
            self._server.cancel_job(job_id, push=self._chance.random() < 0.5)
            self._book.note(f"cancel {job_id}")

    def _forge(self) -> None:
        """A push that nobody of the Platform API's sent, or that means nothing."""
        claimed = [job.id for job in self._server.jobs.values()]
        strike(self._book, "push_forged")
        known = self._chance.choice(claimed) if claimed else JobId("unknown")
        challenge_id = self._challenges[0].id
        self._server.push_hint(
            self._chance.choice(
                (
                    NewJob(seq=10**6, job_id=JobId("never-queued"), challenge_id=challenge_id),
                    NewJob(seq=1, job_id=known, challenge_id=challenge_id),
                    JobCancelled(seq=2, job_id=known),
                )
            )
        )

    # How it ends

    def _unfinished(self) -> list[str]:
        return [
            f"{job.id} is {job.status}, attempt {job.attempt}, releases {job.releases}, lapses {job.lapses}"
            for job in self._server.jobs.values()
            if not job.finished
        ]

    def _open(self) -> list[str]:
        waiting = [
            f"outbox of {node}: {claim}" for node, held in self._laws.waiting.items() for claim in held
        ]
        waiting += [f"validator {node.number} does not run" for node in self._nodes if not node.runs]
        waiting += [f"{name} is being removed" for node in self._nodes for name in node.host.removing()]
        return waiting + [
            f"validator {node.number}: claim {record.claim_id} at {record.stage}"
            for node in self._nodes
            for record in node.store.now_open()
        ]

    async def _until(self, what: str, left: Callable[[], list[str]]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LIVENESS
        while (found := left()) and self._book.until not in self._book.broken:
            if loop.time() >= deadline:
                for each in found[:5]:
                    self._book.violated("liveness", f"{what}: {each}")
                return
            await asyncio.sleep(_LOOK_EVERY)

    def _judge(self) -> None:
        book = self._book
        for node in self._nodes:
            for name in node.host.left():
                book.violated("I3", f"validator {node.number} drained and left {name}")
            if node.host.foreign_left() != len(node.host.foreign):
                book.violated("I3", f"validator {node.number}: a VM of somebody else's is gone")
        for job in self._server.jobs.values():
            book.counts[f"ended_{job.outcome}"] += 1
            book.counts["lapses"] += job.lapses
            script = self._laws.scripts[job.id]
            if self._plan.calm and job.lapses:
                book.violated("I4", f"nothing was wrong, and the lease of {job.id} lapsed")
            if script.does == "kill" and job.outcome not in {"sandbox_died", "infra_error", "cancelled"}:
                book.violated("I9", f"{job.id} kills its CVM, and ended as {job.outcome}")
        book.note("end")


def _settings() -> Settings:
    if not _BASE:
        environment = {
            "VALIDATOR_HOTKEY": Keypair.from_seed(bytes(32)).address,
            "PLATFORM_BASE_API": "http://platform.invalid",
        }
        _BASE.append(load_settings(environment, folder=Path(tempfile.gettempdir()) / "no-such-folder"))
        values = dict(_BASE[0].values) | {"sandbox_config.isolation_level": IsolationLevel.CONTAINER}
        _BASE[0] = Settings(values, _BASE[0].origins)
    return _BASE[0]


_BASE: list[Settings] = []


def _broke(node: Node, key: str) -> bool:
    """Whether its own CVMs failed an instance: by its history, or, while a full disk takes none, as shown."""
    if node.engine is None:
        return False
    for view in node.engine.parts.challenges.views():
        for shown in (view.serving, view.candidate):
            if shown is not None and shown.key == key and shown.state is InstanceState.FAILED:
                return True
        if any(
            event.key == key and event.state is InstanceState.FAILED
            for event in node.store.now_history(view.id)
        ):
            return True
    return False
