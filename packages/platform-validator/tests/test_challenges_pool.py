"""CVMs that stand ready for a challenge: replaced when they end, more when jobs come fast."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from job_house import CHALLENGE, House, history, tick

from platform_protocol.ids import VmName
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import InstanceState, JobOutcome


async def test_a_ready_cvm_that_ends_by_itself_is_replaced(house: House) -> None:
    """Its exit is noticed though nobody uses it, and no job is given to it."""
    async with house.open():
        while not house.challenges.views() or not (
            (serving := house.challenges.views()[0].serving) and serving.ready
        ):
            await tick()
        (first,) = house.fleet.booted
        first.session.die()
        while len(house.fleet.booted) < 2:
            await tick()
        assert first.name in house.fleet.destroyed
        job_id = house.platform.add_job(CHALLENGE)
        await house.ended(job_id)
        await house.journaled(job_id, JobOutcome.SUCCEEDED)


async def test_three_ready_cvms_that_end_in_a_row_make_it_failed_with_the_reason(house: House) -> None:
    """An image whose guests do not last is not Active for ever."""
    async with house.open():
        for count in range(1, 4):
            while len(house.fleet.booted) < count or house.challenges.views()[0].serving is None:
                await tick()
            while not any(cvm is house.fleet.booted[-1] for cvm in house.fleet.alive.values()):
                await tick()
            while (serving := house.challenges.views()[0].serving) is None or not serving.ready:
                await tick()
            house.fleet.booted[-1].session.die()
        while not any("in a row ended" in (each.reason or "") for each in await history(house)):
            await tick()


async def test_ready_cvms_that_cannot_be_journaled_do_not_make_it_failed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk of ours is no fault of the challenge, which goes on serving; the pool fills when it can."""
    async with house.open():
        while (
            serving := house.challenges.views()[0].serving if house.challenges.views() else None
        ) is None or (not serving.ready):
            await tick()
        pool = house.challenges._runners[CHALLENGE]._pool
        boot_one, refused = pool._provisioner.boot_one, itertools.count(1)

        async def full_disk(*given: Any) -> Any:
            if next(refused) <= 5:
                house.quota.release(given[1])
                raise StoreUnavailable("intend_vm: no space left on device")
            return await boot_one(*given)

        monkeypatch.setattr(pool._provisioner, "boot_one", full_disk)
        house.fleet.booted[-1].session.die()
        while len(house.fleet.booted) < 2:
            pool._retry_at = 0.0
            pool._wake()
            await tick()
        assert next(refused) > 6
        assert not any(event.state is InstanceState.FAILED for event in await history(house))
        assert house.challenges.acquire(CHALLENGE) is not None


async def test_the_pool_grows_while_jobs_come_faster_than_cvms_boot(house: House) -> None:
    """As many stand ready as were claimed in the time of one boot; each still has one job in its life."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.challenges._runners[CHALLENGE]._pool.demand.booted(100_000.0)
        for _ in range(3):
            await house.ended(house.platform.add_job(CHALLENGE))
        while (serving := house.challenges.views()[0].serving) is None or serving.ready < 3:
            await tick()
    assert len({id(cvm.session) for cvm in house.fleet.booted}) == len(house.fleet.booted)


async def test_what_stands_ready_on_a_host_that_is_drained_goes_and_another_is_booted(house: House) -> None:
    """The challenge stays Active; CVMs that are not named stay."""
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        (ready,) = house.fleet.alive
        house.challenges.let_go({VmName("somebody-elses")})
        assert ready in house.fleet.alive
        house.challenges.let_go({ready})
        while not house.fleet.alive or ready in house.fleet.alive:
            await tick()
        (view,) = house.challenges.views()
        assert view.state is InstanceState.ACTIVE
        assert house.fleet.destroyed == [ready]
