"""What an operator sees of attestation while the daemon runs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from tests.attestation import forge
from tests.attestation.tee import TeeHouse

from platform_validator.attestation.checks import Check, Outcome, Outcomes
from platform_validator.attestation.policy import AttestationRules
from platform_validator.store.records import InstanceState


async def test_the_status_says_what_is_held_and_known(tmp_path: Path) -> None:
    """And warns of collateral that cannot be refreshed, while it still serves."""
    house = TeeHouse(tmp_path)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        assert house.policy.view() == {
            "quotes": True,
            "tcb_statuses": ["UpToDate"],
            "known_images": 1,
            "collateral": [
                {
                    "fmspc": "70a06d070000",
                    "ca": "platform",
                    "asked_at": "2026-06-01T12:00:00Z",
                    "until": "2026-07-01T12:00:00Z",
                }
            ],
        }
        assert house.policy.warnings() == []
        house.service_down = True
        house.advance(forge.NOW + timedelta(days=2))
        await house.collateral.refresh_due()
        [warning] = house.policy.warnings()
        assert warning.startswith(
            "collateral of platform 70a06d070000 serves until 2026-07-01T12:00:00Z: no answer"
        )
        assert house.policy.trouble() is None


async def test_what_refuses_no_cvm_is_a_warning(tmp_path: Path) -> None:
    """And so is a file of images that cannot be read."""
    house = TeeHouse(tmp_path)
    house.images.path.write_text("[")
    house.policy.rules = AttestationRules(
        outcomes=Outcomes({Check.TCB_STATUS: Outcome.WARN}), images=house.images.known
    )
    first, second = house.policy.warnings()
    assert first == "attestation.checks.tcb_status is warn: it refuses no CVM"
    assert "not TOML" in second


async def test_a_refused_challenge_is_tried_again_when_the_images_change(tmp_path: Path) -> None:
    """Another image of the VMM is reason enough; so is another commit."""
    house = TeeHouse(tmp_path)

    def debug(boot: object) -> None:
        boot.td = {"attributes": bytes.fromhex("0100001000000000")}  # type: ignore[attr-defined] # a Boot

    house.lie = debug
    async with house.open():
        await house.state(InstanceState.FAILED)
        made = len(house.vmm.asked)
        await house.look_again()
        assert len(house.vmm.asked) == made
        house.vmm.new_image("another")
        await house.look_again()
        assert len(house.vmm.asked) == made + 1
        house.lie = None
        house.publish("b" * 40)
        await house.state(InstanceState.ACTIVE)
