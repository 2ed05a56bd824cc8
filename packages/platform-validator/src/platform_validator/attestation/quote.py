"""TDX quotes: their signature chain, by dcap-qvl, and what they measure."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import unquote

import dcap_qvl

from platform_validator.clock import Clock
from platform_validator.errors import ValidatorError

Fetch = Callable[[str], Awaitable[tuple[bytes, dict[str, str]]]]
"""GET a path of a PCCS (`/sgx/certification/v4/…`): body and headers. Raises CollateralUnavailable."""
_FRESH = 3600.0
_DEBUG_BIT = 0x01


class QuoteInvalid(ValidatorError):
    """The quote is none, or its chain, status or fields are not acceptable; the message says which."""


class CollateralUnavailable(ValidatorError):
    """The collateral that a quote needs could not be had."""


@dataclass(frozen=True, slots=True)
class VerifiedQuote:
    """A quote whose chain verified. Registers are 48 bytes, report data 64. `status` is Intel's word.

    `mr_service_td` is zero where no service TD is bound, and in quotes that cannot say (TD 1.0).
    """

    status: str
    advisories: tuple[str, ...]
    mrtd: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    mr_config_id: bytes
    mr_signer_seam: bytes
    report_data: bytes
    debug: bool
    mr_service_td: bytes = bytes(48)


class QuoteChecker:
    """Verifies quotes under one root, with collateral fetched once an hour for each platform.

    Args:
        fetch: A PCCS.
        clock: Its wall clock judges validity.
        root: The root certificate (DER); None: Intel's, built into dcap-qvl.
    """

    def __init__(self, *, fetch: Fetch, clock: Clock, root: bytes | None) -> None:
        self._fetch = fetch
        self._clock = clock
        self._root = root
        self._cached: dict[tuple[str, str], tuple[float, str]] = {}

    async def verify(self, raw: bytes) -> VerifiedQuote:
        """Verify a quote's chain now.

        Raises:
            QuoteInvalid: No TDX quote, or its chain does not verify.
            CollateralUnavailable: It could not be judged.
        """
        try:
            quote = dcap_qvl.parse_quote(raw)
            if not quote.is_tdx():
                raise QuoteInvalid("expected a TDX quote")
            platform = quote.fmspc(), quote.ca()
        except ValueError as error:
            raise QuoteInvalid(f"not a quote: {error}") from error
        return verify_quote(
            raw, await self._collateral(*platform), int(self._clock.now().timestamp()), self._root
        )

    async def _collateral(self, fmspc: str, authority: str) -> str:
        now = self._clock.monotonic()
        held = self._cached.get((fmspc, authority))
        if held is not None and now - held[0] < _FRESH:
            return held[1]
        text = await fetch_collateral(self._fetch, fmspc, authority)
        self._cached[fmspc, authority] = now, text
        return text


def verify_quote(raw: bytes, collateral: str, now: int, root: bytes | None) -> VerifiedQuote:
    """Verify a quote's chain at a time (Unix seconds) with given collateral (dcap-qvl's JSON).

    Raises:
        QuoteInvalid: It does not verify.
    """
    try:
        parsed = dcap_qvl.QuoteCollateralV3.from_json(collateral)
        report = (
            dcap_qvl.verify(raw, parsed, now)
            if root is None
            else dcap_qvl.verify_with_root_ca(raw, parsed, root, now)
        )
        body = dcap_qvl.parse_quote(raw).report
    except ValueError as error:
        raise QuoteInvalid(f"the quote's chain does not verify: {str(error).splitlines()[0]}") from error
    return VerifiedQuote(
        status=str(report.status),
        advisories=tuple(report.advisory_ids),
        mrtd=bytes(body.mr_td),
        rtmrs=(bytes(body.rt_mr0), bytes(body.rt_mr1), bytes(body.rt_mr2), bytes(body.rt_mr3)),
        mr_config_id=bytes(body.mr_config_id),
        mr_signer_seam=bytes(body.mr_signer_seam),
        report_data=bytes(body.report_data),
        debug=bool(bytes(body.td_attributes)[0] & _DEBUG_BIT),
        mr_service_td=bytes(getattr(body, "mr_service_td", bytes(48))),
    )


async def fetch_collateral(fetch: Fetch, fmspc: str, authority: str) -> str:
    """Everything that verifies a quote of this platform, in dcap-qvl's JSON.

    Raises:
        CollateralUnavailable: A part is missing or malformed.
    """
    sgx, tdx = "/sgx/certification/v4", "/tdx/certification/v4"
    pck_crl, pck_head = await fetch(f"{sgx}/pckcrl?ca={authority}&encoding=der")
    root_crl, _ = await fetch(f"{sgx}/rootcacrl")
    tcb, tcb_head = await fetch(f"{tdx}/tcb?fmspc={fmspc}")
    identity, identity_head = await fetch(f"{tdx}/qe/identity?update=standard")
    try:
        tcb_info, tcb_signature = _signed(tcb, "tcbInfo")
        qe_identity, qe_signature = _signed(identity, "enclaveIdentity")
        chains = [
            unquote(_header(head, name))
            for head, name in (
                (pck_head, "SGX-PCK-CRL-Issuer-Chain"),
                (tcb_head, "TCB-Info-Issuer-Chain"),
                (identity_head, "SGX-Enclave-Identity-Issuer-Chain"),
            )
        ]
    except (ValueError, KeyError) as error:
        raise CollateralUnavailable(f"the collateral service's answer cannot be used: {error}") from error
    return json.dumps(
        {
            "pck_crl_issuer_chain": chains[0],
            "root_ca_crl": root_crl.hex() if root_crl[:1] == b"\x30" else root_crl.decode("ascii").strip(),
            "pck_crl": pck_crl.hex(),
            "tcb_info_issuer_chain": chains[1],
            "tcb_info": tcb_info,
            "tcb_info_signature": tcb_signature,
            "qe_identity_issuer_chain": chains[2],
            "qe_identity": qe_identity,
            "qe_identity_signature": qe_signature,
        }
    )


def _signed(answer: bytes, key: str) -> tuple[str, str]:
    """(the signed text exactly as it stands in the answer, signature in hex)."""
    text = answer.decode()
    start = text.index(f'"{key}":') + len(key) + 3
    _, length = json.JSONDecoder().raw_decode(text[start:].lstrip())
    begin = start + len(text[start:]) - len(text[start:].lstrip())
    return text[begin : begin + length], str(json.loads(text)["signature"])


def _header(headers: dict[str, str], name: str) -> str:
    found = next((value for key, value in headers.items() if key.lower() == name.lower()), None)
    if found is None:
        raise KeyError(f"header {name} is missing")
    return found
