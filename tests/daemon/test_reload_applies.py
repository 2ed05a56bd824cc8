"""Each setting that reloads has its effect in a running engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import structlog
from tests.daemon.world import CHALLENGE, HOTKEY, World, play, until

from platform_protocol.ids import JobId
from platform_protocol.platform_messages import ReleaseReason
from platform_validator.config import OPTIONS, ConfigFaults, Settings, load_settings
from platform_validator.cvm.quota import QuotaView
from platform_validator.daemon.board import Board
from platform_validator.daemon.control import DaemonControl, Started
from platform_validator.daemon.systemd import Systemd
from platform_validator.jobs.lease import LeaseRules
from platform_validator.telemetry.metrics import Metrics
from platform_validator.web.control import Cancelling, NotStarted


class Controlled:
    """A Control over an engine in memory; `values` is what a configuration file says now."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.values: dict[str, object] = {}
        self.faults: list[str] = []
        self.board = Board(world.settings, Metrics())
        self.engine = world.engine()
        self.control = DaemonControl(
            world.settings, reread=self.reread, board=self.board, systemd=Systemd(None)
        )

    def reread(self) -> Settings:
        if self.faults:
            raise ConfigFaults(self.faults)
        flags = {"sandbox_config.isolation_level": "Container", **self.values}
        environment = {"VALIDATOR_HOTKEY": HOTKEY, "PLATFORM_BASE_API": "http://nowhere"}
        return load_settings(environment, flags=flags, folder=self.world.folder)

    def start(self) -> asyncio.Task[object]:
        """The engine runs, and is controlled."""
        self.board.components = self.engine.parts
        self.control.start(Started(self.engine, self.world.store, self.world.renewer))
        return asyncio.create_task(self.engine.run())


def _lease(c: Controlled) -> LeaseRules:
    return c.world.renewer.rules


def _quota(c: Controlled) -> QuotaView:
    return c.engine.parts.quota.view()


CASES: list[tuple[str, object, Callable[[Controlled], object], object, object]] = [
    ("resource_limits.cpu_cores", 8, lambda c: _quota(c).free.cpu_cores, 4, 8),
    ("resource_limits.memory_mb", 999, lambda c: _quota(c).free.memory_mb, 2048, 999),
    ("resource_limits.disk_mb", 1, lambda c: _quota(c).free.disk_mb, 10240, 1),
    ("resource_limits.gpu_count", 2, lambda c: _quota(c).free.gpu_count, 0, 2),
    ("resource_limits.max_cvms", 3, lambda c: _quota(c).max_cvms, 16, 3),
    ("jobs.max_concurrent", 1, lambda c: c.board.status()["slots"]["total"], 4, 1),
    ("jobs.outage_grace", "2h", lambda c: _lease(c).outage_grace, timedelta(hours=1), timedelta(hours=2)),
    (
        "jobs.stall_limit",
        "1min",
        lambda c: _lease(c).stall_limit,
        timedelta(minutes=10),
        timedelta(minutes=1),
    ),
    ("jobs.drain_timeout", "1h", lambda c: c.engine.drain_timeout, timedelta(minutes=15), timedelta(hours=1)),
    ("http.metrics", False, lambda c: c.board.metrics() is None, False, True),
]


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """A reload sets up the logs of the process."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.mark.parametrize(
    ("key", "value", "effect", "before", "after"), CASES, ids=[case[0] for case in CASES]
)
def test_what_reloads_has_its_effect(
    tmp_path: Path,
    key: str,
    value: object,
    effect: Callable[[Controlled], object],
    before: object,
    after: object,
) -> None:
    async def story(world: World) -> None:
        controlled = Controlled(world)
        running = controlled.start()
        # The CVM that proved the challenge is gone: nothing is reserved.
        parts = controlled.engine.parts
        await until(lambda: bool(parts.challenges.active_ids()) and not parts.fleet.views())
        assert effect(controlled) == before
        controlled.values[key] = value
        done = controlled.control.reload()
        assert [change["setting"] for change in done.applied] == [key]
        assert effect(controlled) == after
        controlled.engine.drain("over")
        await running

    play(story, tmp_path)


@pytest.mark.parametrize(("value", "form"), [("error", "people"), ("debug", "json")])
def test_logs_change_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, form: str
) -> None:
    async def story(world: World) -> None:
        controlled = Controlled(world)
        controlled.start()
        await until(lambda: controlled.engine.phase == "running")
        controlled.values |= {"validator.log": value, "validator.log_format": form}
        controlled.control.reload()
        capsys.readouterr()
        structlog.get_logger("platform_validator.x").debug("a_detail")
        structlog.get_logger("platform_validator.x").error("a_fault")
        written = capsys.readouterr().err.splitlines()
        assert ["a_detail" in line for line in written] == ([False] if value == "error" else [True, False])
        assert [line.startswith("{") for line in written] == [form == "json"] * len(written)
        controlled.engine.drain("over")

    play(story, tmp_path)


def test_every_setting_that_reloads_is_tried_here() -> None:
    here = {case[0] for case in CASES} | {"validator.log", "validator.log_format"}
    assert here == {option.key for option in OPTIONS if option.reloads}


def test_fewer_slots_let_jobs_finish_and_more_claim_at_once(tmp_path: Path) -> None:
    """Nothing that runs is ended by a reload."""

    async def story(world: World) -> None:
        controlled = Controlled(world)
        running = controlled.start()
        engine, guests = controlled.engine, world.guests
        await until(lambda: bool(engine.parts.challenges.active_ids()) and not world.vmm.machines())
        jobs = [world.platform.add_job(CHALLENGE, timeout_s=7200) for _ in range(3)]
        await until(lambda: len(engine.parts.jobs.views()) == 3)
        controlled.values["jobs.max_concurrent"] = 1
        controlled.control.reload()
        late = world.platform.add_job(CHALLENGE, timeout_s=7200)
        await asyncio.sleep(60)
        assert len(engine.parts.jobs.views()) == 3
        assert world.platform.jobs[late].attempt == 0
        controlled.values["jobs.max_concurrent"] = 4
        controlled.control.reload()
        await until(lambda: len(engine.parts.jobs.views()) == 4)
        guests.may_finish.set()
        await until(lambda: all(world.platform.jobs[job].status == "completed" for job in [*jobs, late]))
        engine.drain("over")
        await running

    play(story, tmp_path)


def test_a_challenge_that_was_too_large_becomes_active_with_larger_limits(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        controlled = Controlled(world)
        running = controlled.start()
        controlled.values["resource_limits.memory_mb"] = 100
        controlled.control.reload()
        await until(
            lambda: [view.state.value for view in controlled.engine.parts.challenges.views()] == ["Failed"]
        )
        controlled.values["resource_limits.memory_mb"] = 4096
        controlled.control.reload()
        await until(lambda: bool(controlled.engine.parts.challenges.active_ids()))
        controlled.engine.drain("over")
        await running

    play(story, tmp_path)


def test_a_wrong_configuration_changes_nothing(tmp_path: Path) -> None:
    """And is told fault by fault."""

    async def story(world: World) -> None:
        controlled = Controlled(world)
        running = controlled.start()
        await until(lambda: controlled.engine.phase == "running")
        controlled.values["jobs.max_concurrent"] = 1
        controlled.faults = ["jobs.max_concurent: unknown setting"]
        done = controlled.control.reload()
        assert (done.faults, done.applied) == (controlled.faults, [])
        assert controlled.board.status()["slots"]["total"] == 4
        controlled.engine.drain("over")
        await running

    play(story, tmp_path)


@pytest.mark.robustness(2, "recovering")
def test_before_it_is_started_only_a_drain_can_be_asked(tmp_path: Path) -> None:
    """Robustness 2: SIGTERM before the components are made: they are made, and end."""

    async def story(world: World) -> None:
        controlled = Controlled(world)
        with pytest.raises(NotStarted):
            controlled.control.reload()
        with pytest.raises(NotStarted):
            await controlled.control.cancel_job(JobId("x"))
        controlled.control.hung_up()
        controlled.control.signalled()
        running = controlled.start()
        async with asyncio.timeout(60):
            await running
        assert "claim" not in world.platform.calls

    play(story, tmp_path)


@pytest.mark.parametrize("by_signal", [True, False])
def test_asking_twice_for_a_drain_does_not_hurry_it(tmp_path: Path, by_signal: bool) -> None:
    """Nor does the first signal after a command; the second signal does, and so does asking for it."""

    async def story(world: World) -> None:
        controlled = Controlled(world)
        running = controlled.start()
        await until(lambda: bool(controlled.engine.parts.challenges.active_ids()))
        job_id = world.platform.add_job(CHALLENGE, timeout_s=7200)
        await until(lambda: bool(controlled.engine.parts.jobs.views()))
        assert controlled.control.drain("operator").jobs == 1
        assert not controlled.control.drain("operator").hurried
        controlled.control.signalled()
        await asyncio.sleep(60)
        assert not running.done()
        if by_signal:
            controlled.control.signalled()
        else:
            assert controlled.control.drain("operator", hurry=True).hurried
        async with asyncio.timeout(60):
            await running
        assert world.platform.jobs[job_id].status == "pending"

    play(story, tmp_path)


@pytest.mark.robustness(17, "after-the-result", "twice", "unknown")
def test_a_cancellation_knows_what_became_of_the_job(tmp_path: Path) -> None:
    """Robustness 17: running, twice, after the result, after the end, and unknown."""

    async def story(world: World) -> None:
        controlled = Controlled(world)
        running = controlled.start()
        engine, control, platform = controlled.engine, controlled.control, world.platform
        await until(lambda: bool(engine.parts.challenges.active_ids()))
        doomed = platform.add_job(CHALLENGE, timeout_s=7200)
        await world.guests.running.wait()
        assert await control.cancel_job(doomed) is Cancelling.CANCELLED
        assert await control.cancel_job(doomed) is Cancelling.CANCELLED
        await until(lambda: not engine.parts.jobs.views())
        assert await control.cancel_job(doomed) is Cancelling.ENDED
        assert platform.jobs[doomed].releases == [ReleaseReason.OPERATOR]
        platform.cancel_job(doomed)
        good = platform.add_job(CHALLENGE, timeout_s=7200)
        await until(lambda: bool(engine.parts.jobs.views()))
        platform.down = True
        world.guests.may_finish.set()
        await until(lambda: engine.parts.outbox.depth == 1)
        assert await control.cancel_job(good) is Cancelling.STORED
        platform.down = False
        await until(lambda: platform.jobs[good].finished)
        await until(lambda: not engine.parts.outbox.depth)
        assert await control.cancel_job(good) is Cancelling.ENDED
        assert await control.cancel_job(JobId("another")) is Cancelling.UNKNOWN
        engine.drain("over")
        await running

    play(story, tmp_path)
