"""TDX quotes: their signature chain, by dcap-qvl, and what they measure."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from platform_validator.attestation.checks import Check
from platform_validator.attestation.collateral import CERTIFICATE_FAULTS, INTEL_ROOT_SHA256
from platform_validator.attestation.collateral_cache import CollateralCache
from platform_validator.clock import Clock
from platform_validator.errors import ValidatorError

TDX_TEE = 0x81
_MAX_QUOTE = 64 * 1024
_VERSIONS = (4, 5)
_HEADER, _BODY, _DESCRIPTOR, _SIGNATURES, _QE_REPORT = 48, 584, 6, 128, 448
_QE_DATA, _PCK_CHAIN = 6, 5
"""Types of certification data (Intel TDX DCAP Quoting Library API, A.3.9)."""
_DEBUG_BIT = 0x01
_SHOWN = 300
_OUT_OF_DATE = "OutOfDate"

# dcap-qvl 0.7 says what failed in words alone: the first line that fits names the check.
_WORDS: tuple[tuple[str, Check], ...] = (
    ("QE report validation", Check.QE_IDENTITY),
    ("Debug mode", Check.DEBUG),
    ("SEPT_VE_DISABLE", Check.TD_ATTRIBUTES),
    ("Reserved bits in TD attributes", Check.TD_ATTRIBUTES),
    ("MR service TD", Check.SERVICE_TD),
    ("TCB status is invalid", Check.TCB_STATUS),
    ("No matching TCB level", Check.TCB_STATUS),
    ("No matching TDX module TCB level", Check.TCB_STATUS),
    ("QE ISVSVN", Check.TCB_STATUS),
    ("qe_report", Check.QE_REPORT),
    ("QE report hash", Check.QE_REPORT),
    ("QE MRSIGNER", Check.QE_IDENTITY),
    ("QE ISVPRODID", Check.QE_IDENTITY),
    ("QE MISCSELECT", Check.QE_IDENTITY),
    ("QE ATTRIBUTES", Check.QE_IDENTITY),
    ("ISV enclave report signature", Check.QUOTE_SIGNATURE),
    ("Fmspc mismatch", Check.PLATFORM),
    ("TDX module", Check.SEAM_MODULE),
    ("module identity", Check.SEAM_MODULE),
    ("SEAMATTRIBUTES", Check.SEAM_MODULE),
    ("certificate", Check.PCK_CHAIN),
    ("PCK", Check.PCK_CHAIN),
    ("Intel extension", Check.PCK_CHAIN),
    ("CertRevoked", Check.PCK_CHAIN),
    ("Unsupported DCAP", Check.QUOTE_FORMAT),
    ("Unknown QE vendor", Check.QUOTE_FORMAT),
    ("must have version", Check.QUOTE_FORMAT),
    ("decode quote", Check.QUOTE_FORMAT),
)


class QuoteInvalid(ValidatorError):
    """The quote is none, or its chain does not verify; `check` names what failed."""

    def __init__(self, check: Check, detail: str) -> None:
        super().__init__(detail)
        self.check = check


@dataclass(frozen=True, slots=True)
class QuoteBody:
    """What a TD report says, as it stands in the quote. Measurements have 48 bytes, report data 64.

    `td_version` is 1.0 or 1.5; `mr_service_td` is zero in 1.0, which cannot say.
    """

    version: int
    td_version: str
    fmspc: str
    authority: str
    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    td_attributes: bytes
    xfam: bytes
    mrtd: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    mr_service_td: bytes = bytes(48)

    @property
    def debug(self) -> bool:
        """Whether the TD runs in debug mode: its memory can be read."""
        return bool(self.td_attributes[0] & _DEBUG_BIT)


@dataclass(frozen=True, slots=True)
class VerifiedQuote:
    """A quote whose chain verified. `status` and `advisories` are Intel's words on its platform.

    Attributes:
        body: What it measured.
        status: The merged TCB status of platform, TDX module and quoting enclave.
        advisories: Security advisories that apply at that status.
        outdated_since: For an out-of-date platform: when the TCB level that it lacks was published.
        collateral_until: When the first part of the collateral expires.
    """

    body: QuoteBody
    status: str
    advisories: tuple[str, ...]
    outdated_since: datetime | None = None
    collateral_until: datetime | None = None


class QuoteChecker:
    """Verifies quotes under one root.

    Args:
        collateral: Where collateral comes from.
        clock: Its wall clock judges validity.
        root: The root certificate (DER); None: Intel's, built into dcap-qvl.
    """

    def __init__(self, *, collateral: CollateralCache, clock: Clock, root: bytes | None) -> None:
        self.collateral = collateral
        self._clock = clock
        self._root = root
        self._root_sha256 = INTEL_ROOT_SHA256 if root is None else hashlib.sha256(root).hexdigest()

    async def verify(self, raw: bytes) -> VerifiedQuote:
        """Verify a quote's chain now.

        Raises:
            QuoteInvalid: No TDX quote, or its chain does not verify.
            CollateralUnavailable: It could not be judged.
        """
        body = parse_quote(raw)
        check_pck_chain(raw, self._root_sha256)
        held = await self.collateral.get(body.fmspc, body.authority)
        return verify_quote(raw, held.text, self._clock.now(), self._root, collateral_until=held.valid_until)


def parse_quote(raw: bytes) -> QuoteBody:
    """What a quote says. Nothing is verified.

    Raises:
        QuoteInvalid: `quote_format`.
    """
    if len(raw) > _MAX_QUOTE:
        raise QuoteInvalid(
            Check.QUOTE_FORMAT, f"expected a quote of at most {_MAX_QUOTE} bytes, got {len(raw)}"
        )
    try:
        quote = dcap_qvl.parse_quote(raw)
        version = int(quote.header.version)
        if not quote.is_tdx() or int(quote.header.tee_type) != TDX_TEE or version not in _VERSIONS:
            raise QuoteInvalid(
                Check.QUOTE_FORMAT, f"expected a TDX quote of version 4 or 5, got version {version}"
            )
        _require_whole(raw, version)
        report = quote.report
        return QuoteBody(
            version=version,
            td_version="1.5" if hasattr(report, "mr_service_td") else "1.0",
            fmspc=str(quote.fmspc()),
            authority=str(quote.ca()),
            tee_tcb_svn=bytes(report.tee_tcb_svn),
            mr_seam=bytes(report.mr_seam),
            mr_signer_seam=bytes(report.mr_signer_seam),
            td_attributes=bytes(report.td_attributes),
            xfam=bytes(report.xfam),
            mrtd=bytes(report.mr_td),
            mr_config_id=bytes(report.mr_config_id),
            mr_owner=bytes(report.mr_owner),
            mr_owner_config=bytes(report.mr_owner_config),
            rtmrs=(bytes(report.rt_mr0), bytes(report.rt_mr1), bytes(report.rt_mr2), bytes(report.rt_mr3)),
            report_data=bytes(report.report_data),
            mr_service_td=bytes(getattr(report, "mr_service_td", bytes(48))),
        )
    except (ValueError, AttributeError) as error:
        detail = _line(error)
        check = Check.PCK_CHAIN if _named(detail) is Check.PCK_CHAIN else Check.QUOTE_FORMAT
        raise QuoteInvalid(check, f"not a TDX quote: {detail}") from error


def _require_whole(raw: bytes, version: int) -> None:
    """Every part ends where the next begins, which nothing signs: dcap-qvl reads some lengths and types only.

    After the last part come but the zeros of the buffer that the quoting library fills.
    """

    def number(at: int, width: int) -> int:
        return int.from_bytes(raw[at : at + width], "little")

    body = _BODY if version == _VERSIONS[0] else _DESCRIPTOR + number(_HEADER + 2, 4)
    at = _HEADER + body
    end = at + 4 + number(at, 4)
    # Signature and key, then type and size of the certification data: the QE's report and its own.
    at += 4 + _SIGNATURES
    qe_end = at + 6 + number(at + 2, 4)
    qe_type, at = number(at, 2), at + 6 + _QE_REPORT
    # The QE's authentication data by its size, then type and size of the certificates.
    at += 2 + number(at, 2)
    chain_type, chain_end = number(at, 2), at + 6 + number(at + 2, 4)
    if (qe_type, chain_type) != (_QE_DATA, _PCK_CHAIN):
        raise QuoteInvalid(
            Check.QUOTE_FORMAT,
            f"expected certification data of types 6 and 5, got {qe_type} and {chain_type}",
        )
    if not end == qe_end == chain_end <= len(raw) or any(raw[end:]):
        raise QuoteInvalid(
            Check.QUOTE_FORMAT,
            f"expected {chain_end} bytes and then zeros, got {len(raw)} of which {end} count",
        )


def check_pck_chain(raw: bytes, root_sha256: str) -> None:
    """Whether the quote's own certificates lead to the root at all.

    dcap-qvl verifies them with their times and CRLs, for which it needs collateral; what was signed under
    another root is refused before any is asked for.

    Raises:
        QuoteInvalid: `pck_chain`.
    """
    try:
        pem = bytes(dcap_qvl.parse_quote(raw).cert_chain_pem_bytes())
        pck, authority, root = x509.load_pem_x509_certificates(pem)
        found = root.fingerprint(hashes.SHA256()).hex()
        if found != root_sha256:
            raise QuoteInvalid(
                Check.PCK_CHAIN, f"expected the root {root_sha256[:16]}…, the quote is of {found[:16]}…"
            )
        pck.verify_directly_issued_by(authority)
        authority.verify_directly_issued_by(root)
    except CERTIFICATE_FAULTS as error:
        raise QuoteInvalid(
            Check.PCK_CHAIN,
            f"expected PCK, PCK CA and root certificates, each issued by the next: {_line(error)}",
        ) from error


def verify_quote(
    raw: bytes,
    collateral: str,
    now: datetime,
    root: bytes | None,
    *,
    collateral_until: datetime | None = None,
) -> VerifiedQuote:
    """Verify a quote's chain at a time with given collateral (dcap-qvl's JSON).

    Raises:
        QuoteInvalid: It does not verify.
    """
    body = parse_quote(raw)
    seconds = int(now.timestamp())
    try:
        parsed = dcap_qvl.QuoteCollateralV3.from_json(collateral)
        report = (
            dcap_qvl.verify(raw, parsed, seconds)
            if root is None
            else dcap_qvl.verify_with_root_ca(raw, parsed, root, seconds)
        )
    except ValueError as error:
        detail = _line(error)
        raise QuoteInvalid(_named(detail), f"the quote does not verify: {detail}") from error
    status = str(report.status)
    since = None
    if status.startswith(_OUT_OF_DATE):
        with contextlib.suppress(ValueError):
            claims = dcap_qvl.QuoteVerifier(root).verify_with_policy(
                raw, parsed, seconds, dcap_qvl.QuotePolicy.claims_only(seconds)
            )
            since = outdated_since(json.loads(collateral), json.loads(claims.to_json()), body.tee_tcb_svn)
    return VerifiedQuote(body, status, tuple(report.advisory_ids), since, collateral_until)


def outdated_since(
    collateral: Mapping[str, str], claims: Mapping[str, Any], tee_tcb_svn: bytes
) -> datetime | None:
    """When the TCB level was published that an out-of-date platform lacks; of several parts the earliest.

    None when it cannot be told: then no grace applies.
    """
    try:
        info, identity = json.loads(collateral["tcb_info"]), json.loads(collateral["qe_identity"])
        newest = []
        if str(claims["platform"]["tcb_level"]["tcbStatus"]).startswith(_OUT_OF_DATE):
            newest.append(_newest(info["tcbLevels"]))
        if str(claims["qe"]["tcb_level"]["tcbStatus"]).startswith(_OUT_OF_DATE):
            newest.append(_newest(identity["tcbLevels"]))
        for module in info.get("tdxModuleIdentities", []):
            if str(module["id"]).upper() == f"TDX_{tee_tcb_svn[1]:02X}":
                met = (level for level in module["tcbLevels"] if tee_tcb_svn[0] >= level["tcb"]["isvsvn"])
                if str(next(met)["tcbStatus"]).startswith(_OUT_OF_DATE):
                    newest.append(_newest(module["tcbLevels"]))
        return min(newest, default=None)
    except (ValueError, KeyError, TypeError, StopIteration):
        return None


def _newest(levels: Iterable[Mapping[str, Any]]) -> datetime:
    return max(datetime.fromisoformat(str(level["tcbDate"])).astimezone(UTC) for level in levels)


def _named(detail: str) -> Check:
    return next((check for word, check in _WORDS if word in detail), Check.QUOTE_CHAIN)


def _line(error: Exception) -> str:
    """All of dcap-qvl's chain of causes in one line."""
    return " ".join(str(error).split())[:_SHOWN]
