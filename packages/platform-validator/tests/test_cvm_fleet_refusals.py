"""Boots that come to nothing: each is named, and gives back what it held."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from fleet_world import (
    PLAN,
    WRITES,
    MakeWorld,
    caught,
    fleet_worlds,
)
from waiting import until

from platform_protocol.ids import ClaimId, VmName
from platform_validator.cvm import errors, probe
from platform_validator.cvm.fleet import Cvm
from platform_validator.cvm.vmm import VmmAtCapacity, VmmRefused, VmmUnavailable, VmState
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import Purpose


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    async with fleet_worlds(tmp_path) as make:
        yield make


@pytest.mark.parametrize("write", WRITES)
async def test_a_store_that_cannot_write_leaves_nothing_running(make_world: MakeWorld, write: str) -> None:
    """Whichever write fails, boot says so; the VM is destroyed even while the store stays broken."""
    world = await make_world()
    world.store.broken = {write}
    with pytest.raises(StoreUnavailable):
        await world.boot()
    await until(lambda: not world.vmm.machines())
    world.store.broken = set()
    await world.nothing_is_left()


async def test_nothing_is_created_that_was_not_journaled(make_world: MakeWorld) -> None:
    """Without an intent in the journal CreateVm is never sent."""
    world = await make_world()
    world.store.broken = {"intend_vm"}
    with pytest.raises(StoreUnavailable):
        await world.boot()
    assert "create" not in world.vmm.calls
    assert world.quota.view().cvms == 0


@pytest.mark.parametrize("stage", ["creating", "booting", "attesting"])
async def test_a_cancelled_boot_is_destroyed(make_world: MakeWorld, stage: str) -> None:
    """At every stage: the VM goes, and its reservation comes back once."""
    world = await make_world()
    boots: list[asyncio.Task[Cvm]] = []

    def cancel(name: str) -> None:
        if name == stage:
            boots[0].cancel()

    async with asyncio.TaskGroup() as group:
        boots.append(
            group.create_task(
                world.fleet.boot(
                    PLAN,
                    purpose=Purpose.JOB,
                    reservation=world.reserve(),
                    claim_id=ClaimId("claim-1"),
                    on_stage=cancel,
                )
            )
        )
    assert boots[0].cancelled()
    await world.nothing_is_left()


@pytest.mark.parametrize(
    ("said", "raised"),
    [
        (VmmAtCapacity("no CID available"), errors.NoCapacity),
        (VmmRefused("Failed to read compose file"), errors.CreateFailed),
        (VmmUnavailable("no answer"), VmmUnavailable),
    ],
)
async def test_a_refused_create_is_named_and_gives_back_its_share(
    make_world: MakeWorld, said: Exception, raised: type[Exception]
) -> None:
    """Full, refused and unanswered are three things."""
    world = await make_world()
    world.vmm.fail("create", said)  # type: ignore[arg-type]  # a VmmError, as parametrised
    with pytest.raises(raised):
        await world.boot()
    await world.nothing_is_left()


async def test_a_port_in_use_is_replaced_by_another(make_world: MakeWorld) -> None:
    """Somebody else listens there: the next CVM gets the next port, and the first one is destroyed."""
    world = await make_world()
    first = world.fleet.hosts.get(DEFAULT_HOST).ports._next
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", first))
        holder.listen()
        cvm = await world.boot()
    assert [spec.host_port for spec in world.specs] == [first, first + 1]
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()


async def test_five_ports_in_use_are_no_capacity(make_world: MakeWorld) -> None:
    """It is given up after five, and says so."""
    world = await make_world()
    world.vmm.fail("create", VmmRefused("port mapping tcp:1 conflicts with VM x"), times=5)
    with pytest.raises(errors.NoCapacity, match="5 tries"):
        await world.boot()
    assert world.vmm.calls.count("create") == 5
    await world.nothing_is_left()


async def test_no_free_host_port_is_no_capacity(make_world: MakeWorld) -> None:
    """Our own range is full: the reservation comes back and the VMM is not asked."""
    world = await make_world(ports=1)
    await world.boot()
    with pytest.raises(errors.NoCapacity, match="port_range"):
        await world.boot()
    assert world.quota.view().cvms == 1


async def test_a_boot_error_of_the_vmm_is_the_reason(make_world: MakeWorld) -> None:
    """The VMM's word is in the message."""
    world = await make_world()
    world.script.status = "starting"
    booting = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        boot = group.create_task(caught(world, booting))
        await booting.wait()
        world.vmm.machines()[0].boot_error = "services.web: no such image"
    assert isinstance(boot.result(), errors.BootFailed)
    assert "no such image" in str(boot.result())
    await world.nothing_is_left()


@pytest.mark.parametrize("state", [VmState.EXITED, VmState.STOPPED])
async def test_a_vm_that_ends_while_booting_has_failed(make_world: MakeWorld, state: VmState) -> None:
    """With the end of its console, and without waiting for the deadline."""
    world = await make_world()
    world.script.status = "starting"
    booting = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        boot = group.create_task(caught(world, booting))
        await booting.wait()
        machine = world.vmm.machines()[0]
        machine.console.append("Kernel panic")
        machine.state = state
    assert "Kernel panic" in str(boot.result())
    await world.nothing_is_left()


async def test_a_challenge_that_fails_to_import_says_why(make_world: MakeWorld) -> None:
    """Health `failed` ends the boot at once, with the SDK's error."""
    world = await make_world()
    world.script.status, world.script.error = "failed", "ImportError: no module named foo"
    with pytest.raises(errors.BootFailed, match="no module named foo"):
        await world.boot()
    await world.nothing_is_left()


async def test_a_startup_handler_that_fails_is_a_refusal(make_world: MakeWorld) -> None:
    """The SDK says error instead of ready."""
    world = await make_world()
    world.script.startup_error = "on_startup: ValueError"
    with pytest.raises(errors.SessionRefused, match="on_startup"):
        await world.boot()
    await world.nothing_is_left()


async def test_a_boot_has_a_deadline(make_world: MakeWorld) -> None:
    """It says running and its SDK never answers ready."""
    world = await make_world(boot=timedelta(seconds=0.2))
    world.script.status = "starting"
    with pytest.raises(errors.BootTimedOut):
        await world.boot()
    await world.nothing_is_left()


async def test_what_answers_under_another_name_is_not_our_vm(make_world: MakeWorld) -> None:
    """A port that leads to another VM: nothing is configured."""
    world = await make_world()
    world.script.says_name = VmName("pv-0123456789-another")
    with pytest.raises(errors.SessionRefused, match="another"):
        await world.boot()
    await world.nothing_is_left()


async def test_a_missing_quote_is_refused_where_simulated_ones_are_asked_for(make_world: MakeWorld) -> None:
    """allow_simulated asks for a quote; none came: no environment goes in."""
    world = await make_world(allow_simulated=True)
    with pytest.raises(errors.AttestationRefused) as caught_error:
        await world.boot()
    assert caught_error.value.check == "quote_missing"
    await world.nothing_is_left()


async def test_a_vmm_that_stays_away_ends_a_boot(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its time; what was made is destroyed once it is back."""
    monkeypatch.setattr(probe, "ABSENCE", timedelta(0))
    world = await make_world()
    world.vmm.fail("get", VmmUnavailable("gone"))
    with pytest.raises(VmmUnavailable):
        await world.boot()
    await world.nothing_is_left()
