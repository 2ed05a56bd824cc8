"""What an operator chooses for attestation: TCB statuses, outcomes of checks, when a host is tried again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from images_vector import PINNED

from platform_validator.attestation.checks import ADJUSTABLE, Check, Outcome, Outcomes
from platform_validator.attestation.gate import FIRST_PAUSE, LONGEST_PAUSE, QuoteGate
from platform_validator.attestation.os_image import (
    ImagesFile,
)
from platform_validator.attestation.tcb import TcbRules, judge_tcb
from platform_validator.config import ConfigFaults, load_settings
from platform_validator.daemon.parts import make_rules

NOW = datetime(2026, 6, 1, tzinfo=UTC)
HOTKEY = {
    "VALIDATOR_HOTKEY": "5H728gLgx4yuCSVEwGCAfLo3RtzTau9F6cTNqNJtrqqjACWq",
    "PLATFORM_BASE_API": "http://nowhere",
}

# TCB


@pytest.mark.parametrize(
    ("status", "advisories", "rules", "found"),
    [
        ("UpToDate", [], TcbRules(), []),
        ("SWHardeningNeeded", [], TcbRules(), ["tcb_status"]),
        ("SWHardeningNeeded", [], TcbRules(statuses=("UpToDate", "SWHardeningNeeded")), []),
        ("UpToDate", ["INTEL-SA-1"], TcbRules(), ["advisories"]),
        ("UpToDate", ["INTEL-SA-1"], TcbRules(advisories=("INTEL-SA-1",)), []),
        ("UpToDate", ["INTEL-SA-1", "INTEL-SA-2"], TcbRules(advisories=("INTEL-SA-1",)), ["advisories"]),
        ("UpToDate", ["INTEL-SA-1"], TcbRules(advisories=("any",)), []),
        ("OutOfDate", ["INTEL-SA-1"], TcbRules(), ["tcb_status", "advisories"]),
        ("Revoked", [], TcbRules(grace=timedelta(days=999)), ["tcb_status"]),
        ("", [], TcbRules(), ["tcb_status"]),
    ],
)
def test_a_status_and_its_advisories_are_accepted_by_name(
    status: str, advisories: list[str], rules: TcbRules, found: list[str]
) -> None:
    since = NOW - timedelta(days=1)
    assert [check for check, _ in judge_tcb(status, advisories, since, rules=rules, now=NOW)] == found


@pytest.mark.parametrize(
    ("days", "accepted"), [(29, True), (30, False), (31, False)], ids=["within", "at its end", "after"]
)
@pytest.mark.parametrize("status", ["OutOfDate", "OutOfDateConfigurationNeeded"])
def test_grace_counts_from_when_the_missing_level_was_published(
    status: str, days: int, accepted: bool
) -> None:
    rules = TcbRules(grace=timedelta(days=30))
    found = judge_tcb(status, [], NOW - timedelta(days=days), rules=rules, now=NOW)
    assert (found == []) is accepted


def test_without_that_time_there_is_no_grace() -> None:
    """Nor for a status that is not for its age."""
    rules = TcbRules(grace=timedelta(days=30))
    assert judge_tcb("OutOfDate", [], None, rules=rules, now=NOW)
    assert judge_tcb("ConfigurationNeeded", [], NOW, rules=rules, now=NOW)


# Outcomes


def test_everything_is_required_at_tee_by_default() -> None:
    """Strictest; below it, only a simulated image's measurements are not asked for."""
    assert {Outcomes(tee=True).of(check) for check in Check} == {Outcome.REQUIRED}
    below = {check: Outcomes(tee=False).of(check) for check in Check}
    assert [check for check, outcome in below.items() if outcome is not Outcome.REQUIRED] == ["os_image"]


def test_only_some_outcomes_can_be_chosen() -> None:
    """Whatever is handed in for another check is not heard."""
    chosen = Outcomes(dict.fromkeys(Check, Outcome.OFF), tee=True)
    assert {check for check in Check if chosen.of(check) is Outcome.OFF} == ADJUSTABLE


def test_the_configuration_becomes_the_policy(tmp_path: Path) -> None:
    """Each setting, under its own name."""
    (tmp_path / "config.toml").write_text(
        '[attestation]\ntcb_statuses = ["UpToDate", "OutOfDate"]\nadvisories = ["any"]\ntcb_grace = "7d"\n'
        f'images_file = "{tmp_path / "known.toml"}"\n[attestation.checks]\n'
        'os_image = "warn"\nadvisories = "off"\n'
    )
    rules = make_rules(load_settings(HOTKEY, folder=tmp_path))
    assert rules.tcb == TcbRules(("UpToDate", "OutOfDate"), ("any",), timedelta(days=7))
    assert rules.outcomes.of(Check.OS_IMAGE) is Outcome.WARN
    assert rules.outcomes.of(Check.ADVISORIES) is Outcome.OFF
    assert rules.outcomes.of(Check.TCB_STATUS) is Outcome.REQUIRED
    before = rules.fingerprint()
    ImagesFile(tmp_path / "known.toml").add(PINNED)
    assert rules.images().pinned == (PINNED,)
    assert rules.fingerprint() != before


@pytest.mark.parametrize(
    "text",
    [
        '[attestation]\ntcb_statuses = ["Revoked"]\n',
        '[attestation]\ntcb_statuses = "Fine"\n',
        '[attestation.checks]\nos_image = "perhaps"\n',
        '[attestation.checks]\nreport_data = "off"\n',
        '[attestation]\ntcb_grace = "soon"\n',
    ],
)
def test_what_is_no_policy_is_a_fault_of_the_configuration(tmp_path: Path, text: str) -> None:
    """Also a check that cannot be turned off."""
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigFaults) as caught:
        load_settings(HOTKEY, folder=tmp_path)
    assert len(caught.value.faults) == 1
    assert "attestation." in caught.value.faults[0]


# The gate


def test_a_host_without_quotes_is_tried_ever_less_often() -> None:
    """30 s, doubled, up to ten minutes; the first quote opens."""
    gate, pauses = QuoteGate(), []
    assert gate.admits(0)
    now = 1000.0
    for _ in range(8):
        gate = gate.without(now)
        assert not gate.admits(now)
        assert gate.without(now + 1) == gate
        pauses.append(gate.closed_until - now)
        now = gate.closed_until
        assert gate.admits(now)
    assert pauses[:3] == [FIRST_PAUSE.total_seconds() * factor for factor in (1, 2, 4)]
    assert pauses[-1] == LONGEST_PAUSE.total_seconds()
    assert gate.shown().admits(1000.0)
