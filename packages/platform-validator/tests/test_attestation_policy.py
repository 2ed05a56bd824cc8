"""The policy over real TDX quotes: what is accepted at Tee and below, and what a quote must say besides."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from tdx_vector import (
    COMPOSE_HASH,
    EVENT_LOG,
    EXPECTED,
    INSTANCE,
    QUOTE,
    RULES,
    VALID,
    At,
    Pccs,
    another_root,
    checker,
    faults_of,
    policy,
    verified,
)

from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_validator.attestation.checks import Check, Outcome, Outcomes
from platform_validator.attestation.errors import AttestationRefused, AttestationUnavailable
from platform_validator.attestation.policy import (
    Accepted,
    AttestationPolicy,
    AttestationRules,
)


async def test_tee_accepts_a_verified_quote_that_binds_this_handshake_and_this_compose() -> None:
    """And says which instance it is."""
    accepted = await policy().judge(QUOTE, EVENT_LOG, EXPECTED)
    assert accepted == Accepted(AttestationKind.TDX, INSTANCE)


async def test_a_replayed_quote_is_refused() -> None:
    """Another nonce, or swapped session keys: the quote binds another handshake."""
    with pytest.raises(AttestationRefused) as refused:
        await policy().judge(QUOTE, EVENT_LOG, replace(EXPECTED, report_data=bytes(64)))
    assert refused.value.check == "report_data"


async def test_the_quote_of_another_app_is_refused() -> None:
    """The right chain with another compose hash; both are named."""
    with pytest.raises(AttestationRefused) as refused:
        await policy().judge(QUOTE, EVENT_LOG, replace(EXPECTED, compose_hash="ab" * 32))
    assert refused.value.check == "compose_hash"
    assert "ab" * 32 in str(refused.value)
    assert COMPOSE_HASH in str(refused.value)


async def test_no_quote_at_tee_is_never_accepted() -> None:
    """Whatever else it says."""
    with pytest.raises(AttestationUnavailable):
        await policy().judge(None, EVENT_LOG, EXPECTED)


async def test_tee_without_a_checker_accepts_nothing() -> None:
    """A fault of ours must not open the door."""
    bare = AttestationPolicy(level=IsolationLevel.TEE, allow_simulated=False, checker=None)
    for raw in (None, QUOTE):
        with pytest.raises(AttestationUnavailable):
            await bare.judge(raw, EVENT_LOG, EXPECTED)


async def test_tee_ignores_allow_simulated() -> None:
    """What verifies is tdx, and a simulated root is no way in."""
    simulated = AttestationPolicy(
        level=IsolationLevel.TEE, allow_simulated=True, checker=checker(root=another_root()), rules=RULES
    )
    with pytest.raises(AttestationRefused) as refused:
        await simulated.judge(QUOTE, EVENT_LOG, EXPECTED)
    assert refused.value.check == "pck_chain"


async def test_a_collateral_service_that_is_down_judges_nothing() -> None:
    """Unavailable, which is no refusal of the CVM."""
    pccs = Pccs()
    pccs.down = True
    with pytest.raises(AttestationUnavailable):
        await policy(pccs.fetch).judge(QUOTE, EVENT_LOG, EXPECTED)


async def test_a_check_that_only_warns_accepts_and_says_so() -> None:
    """An unknown image: refused by default, accepted with a warning, or not looked at."""

    async def judged_with(outcome: Outcome) -> tuple[int, list[tuple[str, str]]]:
        heard: list[tuple[str, str]] = []
        rules = AttestationRules(outcomes=Outcomes({Check.OS_IMAGE: outcome}))
        lax = AttestationPolicy(
            level=IsolationLevel.TEE,
            allow_simulated=False,
            checker=checker(),
            rules=rules,
            clock=At(VALID),
        )
        lax.heard = lambda answer, check: heard.append((answer, check))
        warnings = -1
        with contextlib.suppress(AttestationRefused):
            warnings = len((await lax.judge(QUOTE, EVENT_LOG, EXPECTED)).warnings)
        return warnings, heard

    assert {outcome: await judged_with(outcome) for outcome in Outcome} == {
        Outcome.REQUIRED: (-1, [("refused", "os_image")]),
        Outcome.WARN: (1, [("accepted", "")]),
        Outcome.OFF: (0, [("accepted", "")]),
    }


# Below Tee


@pytest.mark.parametrize("level", [level for level in IsolationLevel if level is not IsolationLevel.TEE])
async def test_below_tee_no_quote_is_asked_for_without_allow_simulated(level: IsolationLevel) -> None:
    """Attestation none, whatever comes."""
    plain = AttestationPolicy(level=level, allow_simulated=False, checker=None)
    for raw in (None, b"anything"):
        assert await plain.judge(raw, "", EXPECTED) == Accepted(AttestationKind.NONE, None)


async def test_a_simulated_quote_is_asked_for_and_must_be_there() -> None:
    """With allow_simulated a missing one is refused, and an accepted one is marked simulated."""
    below = AttestationPolicy(
        level=IsolationLevel.VM, allow_simulated=True, checker=checker(), clock=At(VALID)
    )
    with pytest.raises(AttestationRefused) as refused:
        await below.judge(None, "", EXPECTED)
    assert refused.value.check == "quote_missing"
    assert (await below.judge(QUOTE, EVENT_LOG, EXPECTED)).kind is AttestationKind.SIMULATED


# What a verified quote must say besides


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"td_attributes": b"\x01".ljust(8, b"\x00")}, "debug"),
        ({"mr_signer_seam": b"\x01".rjust(48, b"\x00")}, "seam_signer"),
        ({"mr_service_td": b"\x01".rjust(48, b"\x00")}, "service_td"),
        ({"mr_config_id": b"\x01".ljust(48, b"\x00")}, "mr_config_id"),
        ({"rtmrs": (bytes(48),) * 4}, "rtmr0"),
    ],
)
def test_each_check_has_its_name(change: dict[str, Any], check: str) -> None:
    """So that logs and the reason of a failed challenge say what was wrong."""
    quote = verified()
    assert faults_of(replace(quote, body=replace(quote.body, **change)))[0] == check


def test_a_config_id_that_binds_our_compose_is_accepted() -> None:
    """Form 1 of dstack: 01, the compose hash, zeros."""
    bound = (b"\x01" + bytes.fromhex(COMPOSE_HASH)).ljust(48, b"\x00")
    quote = verified()
    assert faults_of(replace(quote, body=replace(quote.body, mr_config_id=bound))) == []
