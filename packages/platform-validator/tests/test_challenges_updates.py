"""Updates of challenges over the twins: proved beside, drained first, restored, followed."""

from __future__ import annotations

import asyncio
import itertools
from datetime import timedelta
from pathlib import Path

import pytest
from job_house import CHALLENGE, OTHER, TOML, House, answered, good, history, new_commit, tick

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.platform_messages import ActiveChallenge
from platform_protocol.resources import Resources
from platform_validator.challenges import yielding
from platform_validator.challenges.environment import GivenEnv
from platform_validator.challenges.instance import generation_of, instance_key
from platform_validator.challenges.manager import RESTARTED
from platform_validator.challenges.memory import MemorySession
from platform_validator.cvm.errors import BootFailed
from platform_validator.cvm.session import GuestResult, JobOrder
from platform_validator.store.records import InstanceState

ONE_CVM = Resources(cpu_cores=1, memory_mb=256, disk_mb=512)
NONE_READY = TOML + "[execution]\nready = 0\n"


async def served(house: House, commit: str) -> None:
    """Wait until jobs would be claimed for a commit."""
    while (ref := house.challenges.acquire(CHALLENGE)) is None or ref.commit != commit:
        if ref is not None:
            ref.release()
        await tick()
    ref.release()


async def candidate_failed(house: House) -> str:
    """Wait until the candidate has Failed; its reason."""
    while True:
        (view,) = house.challenges.views()
        if view.candidate is not None and view.candidate.state is InstanceState.FAILED:
            return view.candidate.reason or ""
        await tick()


def update(house: House, toml: str = TOML) -> str:
    """Publish another commit, and say so."""
    commit = new_commit(house.folder, toml)
    house.publish(commit)
    house.challenges.wake()
    return commit


class Given:
    """What an operator has given."""

    def __init__(self, values: dict[str, str]) -> None:
        self.values = values

    async def given(self, challenge_id: ChallengeId, repository: str) -> GivenEnv:
        """See `EnvSource`."""
        return GivenEnv(values=self.values)


class Held:
    """Jobs that end when they are let."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.running: list[JobId] = []

    async def work(self, session: MemorySession, order: JobOrder, submission: Path | None) -> GuestResult:
        session.started(False)
        self.running.append(order.job_id)
        await self.go_on.wait()
        return answered(order, {"score": 1.0})


async def test_a_candidate_that_answers_only_twice_does_not_serve(house: House) -> None:
    """Three answers in a row are wanted: it is Failed with its reason beside the Active one."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        while house.challenges.views()[0].candidate is not None:
            await tick()
        house.fleet.next_boot(answers=2)
        first = house.challenges.views()[0].serving
        update(house)
        assert "the guest is dead" in await candidate_failed(house)
        (view,) = house.challenges.views()
        assert first is not None
        assert view.serving is not None
        assert (view.state, view.serving.commit) == (InstanceState.ACTIVE, first.commit)


async def test_there_is_always_an_active_instance_during_an_update(house: House) -> None:
    """By the history, which one transaction wrote: the new one is Active when the old one recycles."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        await served(house, update(house))
        while house.challenges.views()[0].old:
            await tick()
    events = await history(house)
    switched = [event for event in events if event.state is InstanceState.RECYCLING]
    active = [event for event in events if event.state is InstanceState.ACTIVE]
    assert len(switched) == 1
    assert switched[0].at == active[1].at
    states = [event.state for event in events if event.commit == active[0].commit]
    assert states == [
        InstanceState.CREATED,
        InstanceState.PROVISIONING,
        InstanceState.PROBING,
        InstanceState.ACTIVE,
        InstanceState.RECYCLING,
        None,
    ]


async def test_an_import_error_is_shown_to_its_end(house: House) -> None:
    """The last line of a long traceback says what happened: it is not cut off."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        trace = "Traceback\n" + "  File x\n" * 1000 + "ModuleNotFoundError: No module named 'torch'"
        for _ in range(8):
            house.fleet.next_boot(error=BootFailed(f"the challenge failed to start: {trace}"))
        update(house)
        reason = await candidate_failed(house)
    assert reason.startswith("the challenge failed to start")
    assert reason.endswith("ModuleNotFoundError: No module named 'torch'")
    assert len(reason) <= 2100
    failed = [event.reason for event in await history(house) if event.state is InstanceState.FAILED]
    assert reason in failed


async def test_a_failed_candidate_is_superseded_by_the_next_commit_at_once(house: House) -> None:
    """It does not wait for its backoff, which lasting faults make long."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        update(house, "name = 'broken")
        assert (await candidate_failed(house)).startswith("platform_toml_invalid")
        async with asyncio.timeout(5):
            await served(house, update(house))


async def test_another_runtime_is_another_instance_of_the_same_commit(house: House) -> None:
    """A change of the image is a change; back again is none."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        first = house.challenges.views()[0].serving
        assert first is not None
        house.images.runtime = "e" * 64
        house.challenges.wake()
        while house.challenges.views()[0].serving.key == first.key:  # type: ignore[union-attr] # it serves throughout
            await tick()
        second = house.challenges.views()[0].serving
        assert second is not None
        assert (second.commit, second.key) == (first.commit, f"{first.key}:1")
        assert second.compose_hash != first.compose_hash
        for _ in range(3):
            looks = house.images.looks
            house.challenges.wake()
            while house.images.looks == looks:
                await tick()
        assert house.challenges.views()[0].candidate is None


async def test_another_environment_is_another_instance_of_the_same_commit(tmp_path: Path) -> None:
    """What the operator gives reaches CVMs in `configure`, once: those of the old value finish with it."""
    given = Given({"MODE": "slow"})
    house = House(tmp_path, env=given)
    house.publish(new_commit(tmp_path, TOML + "[env.MODE]\n"))
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        given.values = {"MODE": "fast"}
        house.challenges.wake()
        while (serving := house.challenges.views()[0].serving) is None or not serving.key.endswith(":1"):
            await tick()
        await house.ended(house.platform.add_job(CHALLENGE))
        assert house.fleet.booted[0].plan.env == {"MODE": "slow"}
        assert house.fleet.booted[1].plan.env == {"MODE": "fast"}
    active = [event for event in await history(house) if event.state is InstanceState.ACTIVE]
    assert len({event.commit for event in active}) == 1
    assert "fast" not in "".join(event.key for event in active)


async def test_without_room_for_both_the_old_one_is_drained_first_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No job is claimed meanwhile; the one that runs ends on its commit; then the new one serves."""
    monkeypatch.setattr(yielding, "PATIENCE", timedelta(0))
    house, held = House(tmp_path, limits=ONE_CVM), Held()
    house.work = held.work
    house.publish(new_commit(tmp_path, NONE_READY))
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        running = house.platform.add_job(CHALLENGE)
        while not held.running:
            await tick()
        commit = update(house, NONE_READY)
        while house.challenges.active_ids():
            await tick()
        (view,) = house.challenges.views()
        assert view.serving is not None
        assert view.serving.reason == "drained first: no room for both (cpu: 1 wanted, 0 free)"
        assert view.candidate is not None
        assert view.candidate.reason == "cpu: 1 wanted, 0 free"
        house.platform.add_job(CHALLENGE)
        await house.passes(3)
        assert held.running == [running]
        held.go_on.set()
        await served(house, commit)
        await house.ended(running)
    states = [(event.state, event.reason) for event in await history(house)]
    assert (InstanceState.ACTIVE, "drained first: no room for both (cpu: 1 wanted, 0 free)") in states


async def test_an_instance_drained_for_a_candidate_that_fails_takes_jobs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I8: a new version that fails does not end the one that was drained for it."""
    monkeypatch.setattr(yielding, "PATIENCE", timedelta(0))
    house, held = House(tmp_path, limits=ONE_CVM), Held()
    house.work = held.work
    house.publish(new_commit(tmp_path, NONE_READY))
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.platform.add_job(CHALLENGE)
        while not held.running:
            await tick()
        house.fleet.next_boot(error=BootFailed("no kernel"))
        update(house, NONE_READY)
        while house.challenges.active_ids():
            await tick()
        held.go_on.set()
        assert await candidate_failed(house) == "no kernel"
        house.work = good
        await house.ended(house.platform.add_job(CHALLENGE))
        (view,) = house.challenges.views()
        assert view.serving is not None
        assert view.serving.reason is None


async def test_what_served_before_a_crash_comes_up_first_when_the_new_commit_is_broken(house: House) -> None:
    """I8 across a restart: the journal remembers it, also when the next process is killed as well."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        (view,) = house.challenges.views()
        assert view.serving is not None
        commit = view.serving.commit
        update(house, "name = 'broken")
        await candidate_failed(house)
        # Killed here: the journal holds an Active and a Failed instance.
        left = {record.state: record for record in await house.store.instances()}
    assert set(left) == {InstanceState.ACTIVE, InstanceState.FAILED}
    for life in (1, 2):
        again = House(house.folder, platform=house.platform, store=house.store)
        again.fleet.numbers = itertools.count(100 * life)
        stuck = asyncio.Event()
        again.fleet.next_boot(until=stuck)
        async with again.open():
            while not again.fleet.alive:
                await tick()
            (record,) = await again.store.instances()
            assert (record.commit, record.state, record.reason) == (commit, InstanceState.ACTIVE, RESTARTED)
    again = House(house.folder, platform=house.platform, store=house.store)
    again.fleet.numbers = itertools.count(300)
    async with again.open():
        await served(again, commit)
        assert (await candidate_failed(again)).startswith("platform_toml_invalid")


async def test_a_broken_challenge_delays_no_other(house: House) -> None:
    """One whose code is broken, and one whose CVMs do not boot, fail beside one that serves."""
    house.publish(new_commit(house.folder, "name = 'broken"), OTHER, "broken")
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        await house.state(InstanceState.FAILED, OTHER)
        for _ in range(3):
            await house.ended(house.platform.add_job(CHALLENGE))
        await house.state(InstanceState.FAILED, OTHER)


async def test_a_commit_that_flaps_is_not_followed_at_every_turn(house: House) -> None:
    """Ten changes in a moment boot no ten candidates; the last one is followed once it stands."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        for _ in range(10):
            update(house)
            lists = house.platform.calls.count("active_challenges")
            while house.platform.calls.count("active_challenges") == lists:
                await tick()
        created = [event for event in await history(house) if event.state is InstanceState.CREATED]
        assert len(created) <= 4


async def test_the_reservation_of_a_candidate_that_is_superseded_comes_back(house: House) -> None:
    """At whatever step it is dropped, nothing stays reserved but what runs."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        stuck = asyncio.Event()
        house.fleet.next_boot(until=stuck)
        update(house)
        while len(house.fleet.alive) < 2:
            await tick()
        await served(house, update(house))
        await house.all_gone()
        expected = len(house.fleet.alive)
        while house.quota.view().cvms != expected:
            await tick()


def test_the_key_of_a_generation_is_read_back() -> None:
    """After a restart a generation is known from its key."""
    wanted = ActiveChallenge(
        id=CHALLENGE, name="n", status="active", github_repo="o/n", github_commit="1" * 40, resources=ONE_CVM
    )
    keys = [instance_key(wanted, number)[0] for number in (0, 1, 12)]
    assert [generation_of(key) for key in keys] == [0, 1, 12]
    assert len(set(keys)) == 3
