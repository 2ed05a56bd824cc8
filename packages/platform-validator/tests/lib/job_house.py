"""A validator's jobs over the twins, put together as the daemon does it."""

from __future__ import annotations

import asyncio
import random
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.platform_messages import ActiveChallenge, IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.session.messages import JobError
from platform_validator.challenges.environment import EnvSource
from platform_validator.challenges.git_source import GitSource
from platform_validator.challenges.manager import ChallengeManager
from platform_validator.challenges.memory import MemoryFleet, MemorySession
from platform_validator.challenges.resolve import HostRules
from platform_validator.clock import SystemClock
from platform_validator.cvm.quota import Limits, Quota
from platform_validator.cvm.session import GuestResult, JobOrder
from platform_validator.cvm.vmm import VmmFacts, VmmImage
from platform_validator.jobs.diary import Diary
from platform_validator.jobs.ends import JobEnds
from platform_validator.jobs.executor import JobExecutor
from platform_validator.jobs.giving_back import GivingBack
from platform_validator.jobs.lease import LeaseRules, TaskRenewer
from platform_validator.jobs.manager import JobManager
from platform_validator.jobs.notices import Notices
from platform_validator.jobs.observe import Unmeasured
from platform_validator.jobs.outbox import Outbox
from platform_validator.jobs.submissions import Submissions
from platform_validator.jobs.tenure import Tenure
from platform_validator.platform_client.memory import MemoryPlatform
from platform_validator.platform_client.notifications import NotificationLoop
from platform_validator.scoring import ScoringRule
from platform_validator.store.memory import MemoryStore
from platform_validator.store.records import InstanceEvent, InstanceState, JobOutcome, Stage

CHALLENGE = ChallengeId("00000000-0000-4000-8000-0000000000c1")
OTHER = ChallengeId("00000000-0000-4000-8000-0000000000c2")
CVM = Resources(cpu_cores=1, memory_mb=256, disk_mb=512)
LIMITS = Resources(cpu_cores=4, memory_mb=2048, disk_mb=10240)
TOML = 'name = "digits"\nversion = "1"\n[cvm]\ncpu_cores = 1\nmemory_mb = 256\ndisk_mb = 512\n'


class QuickClock(SystemClock):
    """The system's clocks; sleeping is shortened, so that backoffs do not hold a test up."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))


class Endless:
    """Work that begins and never ends; `begun` is set then."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()

    async def __call__(self, session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.started(False)
        self.begun.set()
        await asyncio.Event().wait()
        raise AssertionError


class Images:
    """A VMM that is asked for its images alone."""

    runtime = "d" * 64
    looks = 0

    async def facts(self) -> VmmFacts:
        self.looks += 1
        runtimes = {"platform-runtime": f"sha256:{self.runtime}"}
        image = VmmImage("local-sandbox", IsolationLevel.CONTAINER, runtimes, local=True)
        return VmmFacts("test", (image,))


def answered(order: JobOrder, result: dict[str, object] | None, error: JobError | None = None) -> GuestResult:
    """What a guest sends back."""
    return GuestResult(
        job_id=order.job_id,
        attempt=order.attempt,
        result=result,
        error=error,
        evidence=None,
        logs=[],
        execution_time_ms=5,
        seq=1,
    )


async def good(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
    """A guest that scores every submission 0.5."""
    session.started(False)
    session.progress(50.0, "half")
    session.log("info", "working")
    return answered(order, {"score": 0.5, "metrics": {"accuracy": 0.5}})


@dataclass
class House:
    """A validator's jobs, put together as the daemon does it."""

    folder: Path
    limits: Resources = LIMITS
    max_concurrent: int = 4
    poll_every: float = 0.05
    clock: SystemClock = field(default_factory=QuickClock)
    platform: MemoryPlatform = field(default_factory=lambda: MemoryPlatform(term=timedelta(seconds=0.6)))
    store: MemoryStore = field(default_factory=MemoryStore)
    env: EnvSource | None = None

    def __post_init__(self) -> None:
        clock, rng = self.clock, random.Random(7)
        self.client = self.platform.client()
        self.images = Images()
        self.quota = Quota(Limits(resources=self.limits, max_cvms=16))
        self.work: Callable[[MemorySession, JobOrder, Path | None], Awaitable[GuestResult]] = good

        async def work(session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
            return await self.work(session, order, submission)

        self.fleet = MemoryFleet(store=self.store, quota=self.quota, clock=clock, work=work)
        self.challenges = ChallengeManager(
            client=self.client,
            store=self.store,
            source=GitSource(cache=self.folder / "cache", allow=frozenset({"file"})),
            vmm=self.images,
            fleet=self.fleet,
            quota=self.quota,
            rules=HostRules(level=IsolationLevel.CONTAINER, limits=self.limits),
            clock=clock,
            rng=rng,
            env=self.env,
        )
        self.outbox = Outbox(client=self.client, store=self.store, clock=clock, rng=rng, metrics=Unmeasured())
        ends = JobEnds(store=self.store, clock=clock)
        self.executor = JobExecutor(
            store=self.store,
            fleet=self.fleet,
            quota=self.quota,
            tenure=Tenure(
                client=self.client,
                renewer=TaskRenewer(client=self.client, clock=clock, rules=LeaseRules()),
                clock=clock,
                rng=rng,
            ),
            diary=Diary(store=self.store, outbox=self.outbox, clock=clock, metrics=Unmeasured()),
            submissions=Submissions(
                self.folder / "cache" / "submissions", client=self.client, clock=clock, rng=rng
            ),
            giving_back=GivingBack(client=self.client, clock=clock, rng=rng),
            scoring=ScoringRule(),
            ends=ends,
            metrics=Unmeasured(),
        )
        self.jobs = JobManager(
            client=self.client,
            store=self.store,
            challenges=self.challenges,
            quota=self.quota,
            executor=self.executor,
            clock=clock,
            rng=rng,
            new_id=lambda: str(uuid.uuid4()),
            max_concurrent=self.max_concurrent,
            ends=ends,
            metrics=Unmeasured(),
            poll_every=timedelta(seconds=self.poll_every),
            beat=self._passed,
        )
        self.challenges.on_active = lambda: self.jobs.wake("local")
        self.passes_made = 0
        self.in_use: list[bool] = []
        self.notices = Notices(
            jobs=self.jobs, challenges=self.challenges, on_hotkey_in_use=lambda: self.in_use.append(True)
        )
        self.pushes = NotificationLoop(client=self.client, listener=self.notices, clock=clock, rng=rng)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Every loop, until the block ends."""
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            loops = [
                group.create_task(loop)
                for loop in (
                    self.fleet.run(),
                    self.challenges.run(),
                    self.outbox.run(),
                    self.jobs.run(),
                    self.pushes.run(),
                )
            ]
            try:
                yield
            finally:
                for task in loops:
                    task.cancel()

    def publish(
        self,
        commit: str,
        challenge_id: ChallengeId = CHALLENGE,
        name: str = "digits",
        repository: str | None = None,
    ) -> None:
        """List a challenge at a commit."""
        self.platform.put_challenge(
            ActiveChallenge(
                id=challenge_id,
                name=name,
                status="active",
                github_repo=repository or str(self.folder / "repository"),
                github_commit=commit,
                resources=CVM,
            )
        )

    def _passed(self) -> None:
        self.passes_made += 1

    async def passes(self, count: int) -> None:
        """Wait until the job manager has looked so many times from now on."""
        wanted = self.passes_made + count
        while self.passes_made < wanted:
            await tick()

    async def ended(self, job_id: JobId) -> None:
        """Wait until the Platform API has an end for it."""
        while not self.platform.jobs[job_id].finished:
            await tick()

    async def journaled(self, job_id: JobId, outcome: JobOutcome) -> None:
        """Wait until the journal says that a claim of it ended so."""
        while not any(
            record.job_id == job_id and record.stage is Stage.DONE and record.outcome is outcome
            for record in await self.store.recent_jobs(100)
        ):
            await tick()

    async def state(self, state: InstanceState, challenge_id: ChallengeId = CHALLENGE) -> None:
        """Wait until a challenge shows a state."""
        while not any(view.id == challenge_id and view.state is state for view in self.challenges.views()):
            await tick()

    async def all_gone(self) -> None:
        """Wait until no CVM is left but idle ready ones."""
        while len(await self.store.open_vms()) > sum(
            view.serving.ready for view in self.challenges.views() if view.serving is not None
        ):
            await tick()


async def tick() -> None:
    """Let the loops turn."""
    await asyncio.sleep(0.002)


def new_commit(folder: Path, toml: str) -> str:
    """Commit a platform.toml to the challenge's repository."""
    repository = folder / "repository"
    if not repository.exists():
        repository.mkdir()
        git(repository, "init", "-q", "-b", "main")
    (repository / "platform.toml").write_text(toml)
    (repository / "challenge.py").write_text("")
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "--allow-empty", "-m", "a version")
    return git(repository, "rev-parse", "HEAD")


def git(folder: Path, *arguments: str) -> str:
    """Run git as an author."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.invalid"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


async def history(house: House) -> Sequence[InstanceEvent]:
    """Of its challenge, oldest first."""
    return list(reversed(await house.store.challenge_history(CHALLENGE, 100)))
