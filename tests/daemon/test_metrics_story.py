"""Every metric is fed: a story is played in which each of them has something to tell, and it is scraped."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.daemon.process import BIN
from tests.daemon.process import Daemon as Process
from tests.daemon.world import CHALLENGE, World, play
from tests.daemon.world import until as until_virtually
from waiting import wait_until

from platform_protocol.ids import JobId, VmName
from platform_protocol.resources import Resources
from platform_protocol.signing import Keypair
from platform_validator.cvm.memory import USAGE
from platform_validator.cvm.vmm import VmmRefused, VmmUnavailable, VmSpec
from platform_validator.daemon.board import Board
from platform_validator.daemon.engine import Engine
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.specimens import cvm
from platform_validator.store.sqlite import SqliteStore
from platform_validator.telemetry.metrics import Metrics

PREFIX = "platform_validator_"
ELSEWHERE = {"loop_lag_seconds", "store_failures", "attestations", "challenge_ready_cvms"} | {
    "egress_restarts",
    "egress_open_connections",
    "egress_bytes",
    "egress_connections",
}
"""Fed by what is around the engine (the loop's clock, the database), or what this world does without: it asks
for no quotes, its challenge keeps no ready CVM, and nothing may go out.
"""
Scrape = dict[str, dict[tuple[str, ...], float]]


def read(text: str) -> Scrape:
    """An exposition: by family the values of its series, a histogram's counts alone."""
    found: Scrape = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_created", "_sum", "_bucket")):
                found[family.name.removeprefix(PREFIX)][tuple(sample.labels.values())] = sample.value
    return found


class Watcher:
    """Scrapes one validator again and again, and keeps the largest value of each series."""

    def __init__(self, world: World, engine: Engine) -> None:
        self._board = Board(world.settings, engine._metrics)
        self._board.components, self._board.notifications = engine.parts, engine.notifications
        self.most: Scrape = defaultdict(dict)

    def scrape(self) -> Scrape:
        """Once."""
        answer = self._board.metrics()
        assert answer is not None
        now = read(answer[0].decode())
        for family, series in now.items():
            for labels, value in series.items():
                self.most[family][labels] = max(value, self.most[family].get(labels, 0.0))
        return now

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.scrape()
            await asyncio.sleep(1)


async def first_life(world: World) -> tuple[Watcher, World]:
    """A job that succeeds in spite of everything, one too large, one that runs when it is killed."""
    engine = world.engine()
    watcher = Watcher(world, engine)
    watching = asyncio.create_task(watcher.run())
    running = asyncio.create_task(engine.run())
    await until_virtually(lambda: bool(engine.parts.challenges.active_ids()))
    # Jobs: one is claimed by a push, its lease renewed with and without an answer, its result sent twice.
    world.platform.fail_next("renew")
    for _ in range(4):
        world.platform.fail_next("submit_result")
    world.platform.add_job(CHALLENGE, resources=Resources(cpu_cores=900, memory_mb=1, disk_mb=1))
    job_id = world.platform.add_job(CHALLENGE, timeout_s=900)
    await asyncio.sleep(120)
    world.vmm.fail("usage", VmmUnavailable("no answer"))
    await asyncio.sleep(30)
    world.guests.may_finish.set()
    await until_virtually(lambda: world.platform.jobs[job_id].finished)
    assert getattr(world.platform.jobs[job_id].result, "resource_usage", None) == USAGE.reported()
    # A loop dies; the WebSocket breaks.
    world.platform.close_connections()
    with pytest.MonkeyPatch.context() as fault:
        fault.setattr(world.store, "outbox", None)
        await asyncio.sleep(90)
    # Removing fails for a while; a CreateVm comes late; somebody restored a backup.
    world.vmm.fail("remove", VmmRefused("busy"), times=3)
    world.vmm.fail("create", VmmUnavailable("no answer"))
    late = world.platform.add_job(CHALLENGE)
    await until_virtually(lambda: world.platform.jobs[late].finished and not world.vmm.machines())
    world.vmm.make_late(world.vmm.asked[-1])
    world.vmm.make_late(_stray(world.vmm.asked[-1]))
    await asyncio.sleep(200)
    # Three failures at one stage close the gate.
    world.vmm.fail("create", VmmRefused("internal error"), times=3)
    world.platform.add_job(CHALLENGE)
    await asyncio.sleep(80)
    # It is killed while a job runs.
    world.guests.may_finish.clear()
    world.guests.running.clear()
    world.platform.add_job(CHALLENGE, timeout_s=900)
    await world.guests.running.wait()
    world.guests.may_boot.clear()
    world.guests.booting.clear()
    world.platform.add_job(CHALLENGE, timeout_s=900)
    await world.guests.booting.wait()
    journal = copy.deepcopy(world.store)
    world.platform.down = True
    world.vmm.fail("list", VmmUnavailable("killed"), times=10_000)
    engine.drain("killed")
    engine.drain("killed")
    await running
    watching.cancel()
    world.vmm.heal()
    world.platform.down = False
    world.store = journal
    world.guests.may_boot.set()
    return watcher, world


def _stray(spec: VmSpec) -> VmSpec:
    fields = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    return VmSpec(**fields | {"name": VmName("pv-0123456789-restored"), "host_port": 9})


def test_each_metric_has_something_to_tell(tmp_path: Path) -> None:
    """And each of them in the series that says so; none names a job or the hotkey."""

    async def story(world: World) -> None:
        world.platform.term = world.platform.term / 60
        before, world = await first_life(world)
        engine = world.engine()
        after = Watcher(world, engine)
        running = asyncio.create_task(engine.run())
        await until_virtually(lambda: engine.phase == "running")
        await asyncio.sleep(30)
        after.scrape()
        engine.drain("over")
        engine.drain("over")
        await running
        after.scrape()
        most = before.most
        for family, series in after.most.items():
            for labels, value in series.items():
                most[family][labels] = max(value, most[family].get(labels, 0.0))
        quiet = {family for family, series in most.items() if not any(series.values())}
        assert quiet == ELSEWHERE
        for family, labels in TOLD:
            assert most[family].get(labels, 0.0) > 0, (family, labels, dict(most[family]))
        said = {word for series in most.values() for labels in series for word in labels}
        assert not said & {str(JobId(job)) for job in world.platform.jobs}
        assert world.settings["validator.hotkey"] not in said

    play(story, tmp_path)


TOLD: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lease_renewals", ("granted",)),
    ("lease_renewals", ("unanswered",)),
    ("deliveries", ("accepted",)),
    ("deliveries", ("unanswered",)),
    ("claims_dispatched", ("push",)),
    ("jobs_passed_over", ("cpu",)),
    ("background_restarts", ("outbox",)),
    ("orphans_found", ("sweep",)),
    ("orphans_reclaimed", ("sweep",)),
    ("orphans_found", ("start",)),
    ("orphans_reclaimed", ("start",)),
    ("recovered_jobs", ("release",)),
    ("recovered_jobs", ("adopt",)),
    ("claim_gate_closed", (CHALLENGE,)),
    ("job_slots", ("used",)),
    ("usage_samples", ("sampled",)),
    ("usage_samples", ("failed",)),
    ("quota", ("cvms", "used")),
    ("degraded", ("notifications",)),
)


def test_a_challenge_that_leaves_takes_its_series_along(tmp_path: Path) -> None:
    """`challenge_id` is the one label that grows with what is listed, and shrinks with it."""

    async def story(world: World) -> None:
        engine = world.engine()
        watcher = Watcher(world, engine)
        running = asyncio.create_task(engine.run())
        await until_virtually(lambda: bool(engine.parts.challenges.active_ids()))
        assert watcher.scrape()["claim_gate_closed"] == {(CHALLENGE,): 0.0}
        world.platform._challenges.clear()
        world.platform._version += 1
        await until_virtually(lambda: not engine.parts.challenges.views())
        assert watcher.scrape()["claim_gate_closed"] == {}
        engine.drain("over")
        await running

    play(story, tmp_path)


def test_codes_of_the_platform_api_make_no_endless_series() -> None:
    """After so many different ones, or for none that is a code, they count as one."""
    metrics = Metrics()
    for number in range(500):
        metrics.claim_answered(f"code_{number}")
    metrics.delivery("no code at all\n" + "x" * 1000)
    series = read(metrics.text().decode())
    assert len(series["claims"]) < 60
    assert series["claims"]["other",] > 400
    assert series["deliveries"]["other",] == 1


async def test_a_transaction_that_fails_is_counted(tmp_path: Path) -> None:
    """Whoever asked for it, and whatever becomes of that."""
    metrics = Metrics()
    store = await SqliteStore.open(tmp_path / "validator.db")
    store.trouble.told = metrics.store_failed
    store._db.connection.execute("PRAGMA query_only = 1")
    with pytest.raises(StoreUnavailable):
        await store.intend_vm(cvm())
    assert read(metrics.text().decode())["store_failures"][()] == 1
    await store.close()


@pytest.mark.slow(reason="starts a Platform API and a daemon beside it")
def test_a_real_daemon_tells_of_its_contact_and_its_loop(tmp_path: Path) -> None:
    """The last contact is any answer's; the WebSocket counts; the lag is measured."""
    daemon = Process.made(tmp_path)
    url = f"sqlite:///{tmp_path / 'api.db'}"
    api, hotkey = str(BIN / "platform-api"), Keypair.from_seed(daemon.seed).address
    where = f"127.0.0.1:{daemon.ports[0]}"
    subprocess.run([api, "admin", "validators", "add", hotkey, "--database-url", url], check=True, timeout=60)
    serve = [api, "serve", "--database-url", url, "--listen", where, "--public-url", f"http://{where}"]

    def scraped() -> Scrape:
        address = f"http://127.0.0.1:{daemon.ports[2]}/metrics"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return read(answer.read().decode())

    with (
        subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
        daemon.running(tmp_path / "log"),
    ):
        try:
            wait_until("it is up", lambda: daemon.health() != {}, 60)
            wait_until("connected", lambda: scraped()["notifications_connected"].get(()) == 1, 60)
            now = scraped()
        finally:
            server.terminate()
    assert now["platform_last_contact_timestamp_seconds"][()] > 1.7e9
    assert now["notifications_connected"][()] == 1
    assert now["notification_connections"][()] >= 1
    assert now["loop_lag_seconds"][()] >= 0
    assert json.dumps(sorted(now)).count(hotkey) == 0
