"""The first start at Tee is no dead end: an image is measured and made known, and its challenge comes up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.attestation.tee import CHALLENGE, SHAPE, Boot, TeeHouse
from waiting import until

from platform_protocol.receipts import open_receipt
from platform_validator.attestation.os_image import Shape
from platform_validator.cvm.memory import IMAGE
from platform_validator.daemon.pinning import Pinning, PinState
from platform_validator.store.records import InstanceState
from platform_validator.web.control import PinBusy


async def measured(house: TeeHouse, image: str = IMAGE, shape: Shape = SHAPE) -> Pinning:
    """Ask, and wait for the end of it."""
    house.pinner.ask(image, shape)
    await until(lambda: house.pinner.now.state is not PinState.BOOTING)
    return house.pinner.now


async def test_what_an_unknown_image_measures_is_found_and_makes_it_known(tmp_path: Path) -> None:
    """One CVM, destroyed again; the origin says first use; the challenge comes up without a restart."""
    house = TeeHouse(tmp_path)
    async with house.open(pinned=False):
        await house.state(InstanceState.FAILED)
        before = len(house.vmm.asked)
        found = await measured(house)
        assert (found.state, found.attestation, found.tcb_status) == (PinState.MEASURED, "tdx", "UpToDate")
        assert found.pinned is not None
        assert found.pinned.origin.startswith("first use (measured 2026-06-01T12:00:00Z on unix:/vmm.sock")
        assert (found.pinned.mrtd, found.pinned.rtmr2) == (house.pinned.mrtd, house.pinned.rtmr2)
        assert len(house.vmm.asked) == before + 1
        await until(lambda: not house.vmm.machines())
        house.images.add(found.pinned)
        for runner in house.engine.parts.challenges._runners.values():
            runner._retry_at = 0.0
            runner.wake()
        await house.state(InstanceState.ACTIVE)
        # And its receipts say so from then on; the journal had it before anything went in.
        job = house.submit()
        await until(lambda: job.finished)
        assert job.result is not None
        facts = open_receipt(job.result.receipt or {}).facts
        expected = {
            "trust": "pinned_first_use",
            "image": IMAGE,
            "cpu": 1,
            "memory_mb": 256,
            "gpus": 0,
            "origin": found.pinned.origin,
            "first_use": "2026-06-01T12:00:00Z",
        }
        assert facts.os_image == expected
        told = [
            vm.os_image
            for vm in house.store._vms._vms.values()
            if vm.challenge_id == CHALLENGE and vm.os_image
        ]
        assert [json.loads(one) for one in told] == [expected] * len(told)
        assert told


async def test_a_cvm_that_fails_another_check_is_not_pinned(tmp_path: Path) -> None:
    """Only an unknown image is passed over."""
    house = TeeHouse(tmp_path)

    def debug(boot: Boot) -> None:
        boot.td = {"attributes": bytes.fromhex("0100001000000000")}

    house.lie = debug
    async with house.open(pinned=False):
        await house.state(InstanceState.FAILED)
        found = await measured(house)
        assert (found.state, found.pinned) == (PinState.FAILED, None)
        assert "check debug" in str(found.error)


@pytest.mark.parametrize(
    ("image", "shape", "says"),
    [
        ("another", SHAPE, "the VMM has no image 'another'"),
        (IMAGE, Shape(64, 256), "no room for 64 vCPUs, 256 MB"),
    ],
)
async def test_what_cannot_be_booted_says_why(tmp_path: Path, image: str, shape: Shape, says: str) -> None:
    house = TeeHouse(tmp_path)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        found = await measured(house, image, shape)
        assert found.state is PinState.FAILED
        assert says in str(found.error)


async def test_one_is_measured_at_a_time(tmp_path: Path) -> None:
    """The same again joins in; another is told to wait."""
    house = TeeHouse(tmp_path)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        first = house.pinner.ask(IMAGE, SHAPE)
        assert house.pinner.ask(IMAGE, SHAPE) is first
        with pytest.raises(PinBusy):
            house.pinner.ask(IMAGE, Shape(2, 512))
        assert (await measured(house)).state is PinState.MEASURED
