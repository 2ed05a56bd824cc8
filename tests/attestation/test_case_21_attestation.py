"""Robustness 21, over the whole job path at level Tee: a CVM that is not believed gets nothing.

Quotes are generated under a root that only these tests know; session, handshake and policy are the product's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from tests.attestation import forge
from tests.attestation.evidence import runtime
from tests.attestation.tee import SUBMISSION, Boot, TeeHouse
from waiting import until

from platform_protocol.platform_messages import ReleaseReason
from platform_validator.store.records import InstanceState


def _another_app(boot: Boot) -> None:
    for event in boot.events:
        if event["event"] in {"app-id", "compose-hash"}:
            event["event_payload"] = "ab" * (len(event["event_payload"]) // 2)


def _another_compose(boot: Boot) -> None:
    for event in boot.events:
        if event["event"] == "compose-hash":
            event["event_payload"] = "ab" * 32


def _replayed(boot: Boot) -> None:
    boot.report_data = bytes(64)


def _swapped(boot: Boot) -> None:
    # What a man in the middle has: a true quote that binds the key of the guest behind him.
    boot.report_data = boot.report_data[::-1]


def _tampered_log(boot: Boot) -> None:
    boot.shown = [*boot.events, runtime("compose-hash", "ab" * 32)]


def _debug(boot: Boot) -> None:
    boot.td = {"attributes": bytes.fromhex("0100001000000000")}


def _another_image(boot: Boot) -> None:
    boot.td = {"mrtd": b"m" * 48}


LIES: list[tuple[str, Callable[[Boot], None], str]] = [
    ("the quote of another app", _another_app, "compose_hash"),
    ("the right quote with another compose hash", _another_compose, "compose_hash"),
    ("a replayed nonce", _replayed, "report_data"),
    ("swapped session keys", _swapped, "report_data"),
    ("a tampered event log", _tampered_log, "rtmr3"),
    ("the debug bit", _debug, "debug"),
    ("another OS image", _another_image, "os_image"),
]


def exposed(house: TeeHouse) -> str:
    """What /metrics shows."""
    return house.engine._metrics.text().decode()


@pytest.mark.robustness(21, "honest")
async def test_case_21_an_honest_cvm_runs_the_job(tmp_path: Path) -> None:
    """Without this the others would prove nothing: the result is marked tdx."""
    house = TeeHouse(tmp_path)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        job = house.submit()
        await until(lambda: job.finished)
        assert (job.outcome, job.attempt) == ("succeeded", 1)
        assert job.result is not None
        assert job.result.attestation is not None
        assert job.result.attestation.value == "tdx"
        assert 'attestations_total{answer="accepted",check=""} 0.0' not in exposed(house)


@pytest.mark.robustness(
    21, "another-app", "another-compose", "replayed-nonce", "swapped-keys", "tampered-log", "debug-bit"
)
@pytest.mark.parametrize(("name", "lie", "check"), LIES, ids=[name for name, _, _ in LIES])
async def test_case_21_a_lying_cvm_gets_no_submission_and_no_secret(
    tmp_path: Path, name: str, lie: Callable[[Boot], None], check: str
) -> None:
    """The job is given back, the challenge Failed under the check's name, and the CVM destroyed."""
    house = TeeHouse(tmp_path)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        honest = len(house.vmm.guests)
        house.lie = lie
        job = house.submit()
        reason = await house.state(InstanceState.FAILED)
        assert str(reason).startswith(f"attestation_refused: {check}: ")
        await until(lambda: not house.vmm.machines() and job.releases)
        liars = house.vmm.guests[honest:]
        assert len(liars) == 1
        assert house.were_sent(liars) == []
        assert job.releases == [ReleaseReason.INFRA]
        assert not job.finished
        assert f'attestations_total{{answer="refused",check="{check}"}} 1.0' in exposed(house)


@pytest.mark.robustness(21, "old-tcb")
async def test_case_21_an_old_tcb_gets_nothing(tmp_path: Path) -> None:
    """The platform fell behind after the challenge became Active: new collateral says so."""
    house = TeeHouse(tmp_path)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        honest = len(house.vmm.guests)
        house.info = forge.tcb_info()
        newer = forge.tcb_level("UpToDate", date="2026-06-01T00:00:00Z", svn=2)
        house.info["tcbLevels"] = [newer, forge.tcb_level("OutOfDate")]
        house.info["issueDate"] = forge.when(forge.NOW - timedelta(hours=1))
        house.advance(forge.NOW + timedelta(hours=13))
        await house.collateral.refresh_due()
        job = house.submit()
        reason = await house.state(InstanceState.FAILED)
        assert str(reason).startswith("attestation_refused: tcb_status: the platform's TCB is OutOfDate")
        await until(lambda: job.releases)
        assert house.were_sent(house.vmm.guests[honest:]) == []


@pytest.mark.robustness(21, "collateral-down")
@pytest.mark.slow(reason="a boot's whole deadline passes")
async def test_case_21_without_the_collateral_service_nothing_is_sent_and_nothing_claimed(
    tmp_path: Path,
) -> None:
    """Given back as attestation_unavailable after the boot deadline; it goes on when the service is back."""
    house = TeeHouse(tmp_path)
    house.info = forge.tcb_info() | {"nextUpdate": forge.when(forge.NOW + timedelta(hours=1))}
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        honest = len(house.vmm.guests)

        def expires(_boot: Boot) -> None:
            # While it boots, and after the claim: before it there would be none.
            house.service_down = True
            house.advance(forge.NOW + timedelta(minutes=61))

        house.lie = expires
        house.allow(timedelta(seconds=1))
        job = house.submit()
        await until(lambda: job.releases)
        house.engine.parts.jobs.wake("local")
        assert job.releases == [ReleaseReason.ATTESTATION_UNAVAILABLE]
        assert house.were_sent(house.vmm.guests[honest:]) == []
        assert not house.policy.can_attest()
        assert "no valid collateral" in str(house.policy.trouble())
        assert job.attempt == 1
        # Back, with collateral of today.
        house.lie = None
        house.allow(timedelta(seconds=20))
        house.advance(forge.NOW)
        house.service_down = False
        while not job.finished:
            house.engine.parts.jobs.wake("local")
            await asyncio.sleep(0.02)
        assert (job.outcome, job.attempt) == ("succeeded", 2)


@pytest.mark.robustness(21, "collateral-down")
async def test_case_21_cached_collateral_serves_while_the_service_is_down(tmp_path: Path) -> None:
    """Valid and kept: the job runs, and the trouble is a warning."""
    house = TeeHouse(tmp_path)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        house.service_down = True
        house.advance(forge.NOW + timedelta(days=20))
        await house.collateral.refresh_due()
        job = house.submit()
        await until(lambda: job.finished)
        assert job.outcome == "succeeded"
        assert "serves until" in str(house.collateral.stale())


@pytest.mark.robustness(21, "no-quote")
async def test_case_21_no_quote_at_tee_stops_the_claiming_for_a_while(tmp_path: Path) -> None:
    """Given back as attestation_unavailable; the next quote opens it again."""
    house = TeeHouse(tmp_path)
    async with house.open():
        await house.state(InstanceState.ACTIVE)
        honest = len(house.vmm.guests)

        def none(boot: Boot) -> None:
            boot.quote = False

        house.lie = none
        house.allow(timedelta(seconds=0.3))
        job = house.submit()
        await until(lambda: job.releases)
        assert job.releases == [ReleaseReason.ATTESTATION_UNAVAILABLE]
        assert house.were_sent(house.vmm.guests[honest:]) == []
        assert not house.policy.can_attest()
        assert "showed no quote" in str(house.policy.trouble())


async def test_a_first_start_at_tee_names_the_command_that_pins_the_image(tmp_path: Path) -> None:
    """No image is known: Failed with the whole command; once the file has it, Active without a restart."""
    house = TeeHouse(tmp_path)
    async with house.open(pinned=False):
        reason = await house.state(InstanceState.FAILED)
        assert "validator attestation pin --image memory --cpu 1 --memory 256" in str(reason)
        assert house.were_sent(house.vmm.guests) == []
        house.images.add(house.pinned)
        for runner in house.engine.parts.challenges._runners.values():
            runner._retry_at = 0.0
            runner.wake()
        await house.state(InstanceState.ACTIVE)


async def test_what_was_refused_is_not_booted_again(tmp_path: Path) -> None:
    """Neither with time nor with jobs, until the policy changes: no CVM is made."""
    house = TeeHouse(tmp_path)
    house.lie = _debug
    async with house.open():
        await house.state(InstanceState.FAILED)
        made = len(house.vmm.asked)
        job = house.submit()
        for _ in range(20):
            for runner in house.engine.parts.challenges._runners.values():
                runner._retry_at = 0.0
                runner.wake()
            house.engine.parts.jobs.wake()
            await asyncio.sleep(0.02)  # time in which it could boot, which is what must not happen
        assert len(house.vmm.asked) == made
        assert job.attempt == 0
        assert SUBMISSION not in house.were_sent(house.vmm.guests)
