"""The chain of a real TDX quote, from its collateral to Intel's root: what verifies, and what does not."""

from __future__ import annotations

import base64
import json
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

from platform_validator.attestation.collateral import CollateralInvalid, read_collateral
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


@pytest.mark.parametrize("which", [0, 1, 2], ids=["PCK", "PCK CA", "root"])
async def test_a_certificate_of_a_version_that_there_is_none_of_is_refused(which: int) -> None:
    """By name, as all that is wrong with a quote's certificates; in collateral too."""
    with pytest.raises(AttestationRefused) as refused:
        await policy().judge(_version_5(QUOTE, which), EVENT_LOG, EXPECTED)
    assert refused.value.check == "pck_chain"
    held = json.loads(COLLATERAL)
    for name in ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain"):
        chain = _version_5(held[name].encode(), which % 2).decode()
        with pytest.raises(CollateralInvalid):
            read_collateral(
                json.dumps(held | {name: chain}), fmspc="90C06F000000", authority="platform", now=VALID
            )


def _version_5(data: bytes, which: int) -> bytes:
    """With the version of one of its certificates changed; everything stays as long as it was."""
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    parts = data.split(begin)
    text, rest = parts[which + 1].split(end)
    version = bytes.fromhex("a003020102")
    coded = base64.b64encode(base64.b64decode(text).replace(version, version[:-1] + b"\x05", 1))
    lines = [coded[at : at + 64] for at in range(0, len(coded), 64)]
    parts[which + 1] = b"\n".join([b"", *lines, end]) + rest
    changed = begin.join(parts)
    assert len(changed) == len(data)
    return changed
