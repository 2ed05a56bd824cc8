"""The chain of a real TDX quote, from its collateral to Intel's root: what verifies, and what does not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from tdx_vector import (
    COLLATERAL,
    DATA,
    EVENT_LOG,
    EXPECTED,
    QUOTE,
    REPORT_DATA,
    VALID,
    Pccs,
    another_root,
    policy,
    verified,
)

from platform_validator.attestation.errors import AttestationRefused
from platform_validator.attestation.quote import (
    QuoteInvalid,
    verify_quote,
)


def test_a_real_quote_verifies_while_its_collateral_is_valid() -> None:
    """Two platforms, each with its own collateral and moment."""
    first = verify_quote(
        (DATA / "tdx_quote.bin").read_bytes(),
        (DATA / "tdx_quote_collateral.json").read_text(),
        datetime.fromtimestamp(1750331763, UTC),
        None,
    )
    assert (first.status, first.body.debug) == ("UpToDate", False)
    second = verified()
    assert second.status == "UpToDate"
    assert second.body.report_data == REPORT_DATA


@pytest.mark.parametrize("moment", [VALID + timedelta(days=60), VALID - timedelta(days=60)])
def test_a_quote_does_not_verify_outside_the_time_of_its_collateral(moment: datetime) -> None:
    """Expired, or not valid yet."""
    with pytest.raises(QuoteInvalid):
        verify_quote(QUOTE, COLLATERAL, moment, None)


@pytest.mark.parametrize("offset", [20, 48, 184, 528, 568, 640, 700, 800])
def test_a_flipped_bit_breaks_the_chain(offset: int) -> None:
    """Header, body, report data, signature, key, quoting enclave."""
    changed = bytearray(QUOTE)
    changed[offset] ^= 1
    with pytest.raises(QuoteInvalid):
        verify_quote(bytes(changed), COLLATERAL, VALID, None)


def test_another_root_is_not_believed() -> None:
    """Intel's quote under a root that is not Intel's, though it has its name."""
    with pytest.raises(QuoteInvalid):
        verify_quote(QUOTE, COLLATERAL, VALID, another_root())


def test_collateral_of_another_platform_does_not_verify() -> None:
    """FMSPC B0C06F000000's for a quote of 90C06F000000."""
    other = (DATA / "tdx_quote_collateral.json").read_text()
    with pytest.raises(QuoteInvalid):
        verify_quote(QUOTE, other, datetime.fromtimestamp(1750331763, UTC), None)


@pytest.mark.parametrize("raw", [b"", b"NOT A QUOTE platform-validator".ljust(1024, b"\x00"), QUOTE[:700]])
async def test_what_is_no_quote_is_refused(raw: bytes) -> None:
    """Without asking for collateral."""
    pccs = Pccs()
    with pytest.raises(AttestationRefused) as refused:
        await policy(pccs.fetch).judge(raw, EVENT_LOG, EXPECTED)
    assert refused.value.check == "quote_format"
    assert pccs.asked == []
