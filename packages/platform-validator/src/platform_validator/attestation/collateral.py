"""Collateral: what Intel signs about platforms, and whether it can be used now.

dcap-qvl verifies collateral together with a quote and says no to both. A service that gives bad collateral
must not condemn a CVM, and bad collateral must not be kept, so its own signatures and times are verified when
it arrives: TCB info and QE identity (Intel's PCS API version 4), the two CRLs, their issuers up to the root.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import aiohttp
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from platform_validator.errors import ValidatorError

Fetch = Callable[[str], Awaitable[tuple[bytes, dict[str, str]]]]
"""GET a path of a PCCS (`/sgx/certification/v4/…`): body and headers. Raises CollateralUnavailable."""

INTEL_ROOT_SHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
"""Of the certificate "Intel SGX Root CA" (DER), the one that dcap-qvl has built in."""
CERTIFICATE_FAULTS = (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion)
"""What cryptography raises over certificates and CRLs that cannot be used."""

_TIMEOUT = 20.0
_MAX = 4 * 1024 * 1024
_OK = 200
_SIGNATURE = 64
_FIELDS = (
    "pck_crl_issuer_chain",
    "root_ca_crl",
    "pck_crl",
    "tcb_info_issuer_chain",
    "tcb_info",
    "tcb_info_signature",
    "qe_identity_issuer_chain",
    "qe_identity",
    "qe_identity_signature",
)


class CollateralUnavailable(ValidatorError):
    """The collateral that a quote needs could not be had."""


class CollateralInvalid(CollateralUnavailable):
    """What was given is no collateral that can be used now; `part` names what is wrong with it."""

    def __init__(self, part: str, detail: str) -> None:
        super().__init__(f"the collateral cannot be used: {part}: {detail}")
        self.part = part


@dataclass(frozen=True, slots=True)
class Collateral:
    """Collateral whose own signatures hold, for one platform.

    Attributes:
        fmspc: The platform, hex.
        authority: The CA of its PCK certificates: `platform` or `processor`.
        text: dcap-qvl's JSON.
        issued: When the newest of TCB info, QE identity and CRLs was issued.
        valid_until: When the first of its parts expires.
    """

    fmspc: str
    authority: str
    text: str
    issued: datetime
    valid_until: datetime


def read_collateral(
    text: str, *, fmspc: str, authority: str, now: datetime, root_sha256: str = INTEL_ROOT_SHA256
) -> Collateral:
    """Verify collateral by itself.

    Args:
        text: dcap-qvl's JSON.
        fmspc: The platform that it must be for, hex.
        authority: `platform` or `processor`.
        now: When it must be valid.
        root_sha256: The root's certificate, by the SHA-256 of its DER form.

    Raises:
        CollateralInvalid: `form`, `root`, `signer` (a certificate), `root_crl`, `pck_crl`, `tcb_info`,
            `qe_identity` or `platform`.
    """
    try:
        held = json.loads(text)
        if not isinstance(held, dict) or not all(isinstance(held.get(name), str) for name in _FIELDS):
            raise CollateralInvalid("form", f"expected JSON with the strings {', '.join(_FIELDS)}")
        reading = _Reading(held, now, root_sha256)
        return reading.read(text, fmspc, authority)
    except (*CERTIFICATE_FAULTS, KeyError, RecursionError) as error:
        raise CollateralInvalid("form", _line(error)) from error


class _Reading:
    def __init__(self, held: dict[str, str], now: datetime, root_sha256: str) -> None:
        self._held = held
        self._now = now
        self._root_sha256 = root_sha256
        self._from: list[datetime] = []
        self._until: list[datetime] = []

    def read(self, text: str, fmspc: str, authority: str) -> Collateral:
        pck_ca, root = self._chain("pck_crl_issuer_chain")
        root_crl = self._crl("root_ca_crl", "root_crl", root)
        self._crl("pck_crl", "pck_crl", pck_ca)
        tcb = self._signed("tcb_info", root_crl)
        identity = self._signed("qe_identity", root_crl)
        _require(
            root_crl.get_revoked_certificate_by_serial_number(pck_ca.serial_number) is None,
            "signer",
            "the PCK CA is revoked",
        )
        _require(
            str(tcb.get("fmspc", "")).lower() == fmspc.lower() and tcb.get("id") == "TDX",
            "platform",
            f"expected TCB info of TDX platform {fmspc}, got {tcb.get('id')} {tcb.get('fmspc')}",
        )
        _require(
            identity.get("id") == "TD_QE",
            "qe_identity",
            f"expected that of TDX's quoting enclave (TD_QE), got {str(identity.get('id'))[:32]}",
        )
        word = f"{authority} ca"
        _require(
            word in pck_ca.subject.rfc4514_string().lower(), "platform", f"the PCK CRL is not of the {word}"
        )
        return Collateral(fmspc, authority, text, max(self._from), min(self._until))

    def _chain(self, name: str) -> tuple[x509.Certificate, x509.Certificate]:
        """The issuer and the root; every chain of collateral has these two."""
        certificates = x509.load_pem_x509_certificates(self._held[name].encode())
        _require(
            len(certificates) == 2,  # noqa: PLR2004 - the issuer and the root
            "signer",
            f"{name}: expected two certificates, got {len(certificates)}",
        )
        issuer, root = certificates
        print_ = root.fingerprint(hashes.SHA256()).hex()
        _require(
            print_ == self._root_sha256,
            "root",
            f"{name}: expected the root {self._root_sha256[:16]}…, got {print_[:16]}…",
        )
        try:
            issuer.verify_directly_issued_by(root)
        except CERTIFICATE_FAULTS as error:
            raise CollateralInvalid("signer", f"{name}: the issuer is not signed by the root") from error
        for certificate in (issuer, root):
            self._times(
                "signer", certificate.not_valid_before_utc, certificate.not_valid_after_utc, issue=False
            )
        return issuer, root

    def _crl(self, name: str, part: str, issuer: x509.Certificate) -> x509.CertificateRevocationList:
        crl = x509.load_der_x509_crl(bytes.fromhex(self._held[name]))
        key = issuer.public_key()
        _require(
            isinstance(key, ec.EllipticCurvePublicKey)
            and crl.issuer == issuer.subject
            and crl.is_signature_valid(key),
            part,
            "it is not signed by its issuer",
        )
        _require(crl.next_update_utc is not None, part, "it does not say when the next one comes")
        self._times(part, crl.last_update_utc, crl.next_update_utc or self._now)
        return crl

    def _signed(self, name: str, root_crl: x509.CertificateRevocationList) -> dict[str, Any]:
        signer, _ = self._chain(f"{name}_issuer_chain")
        _require(
            root_crl.get_revoked_certificate_by_serial_number(signer.serial_number) is None,
            "signer",
            f"the signer of {name} is revoked",
        )
        key, raw = signer.public_key(), bytes.fromhex(self._held[f"{name}_signature"])
        _require(
            isinstance(key, ec.EllipticCurvePublicKey) and len(raw) == _SIGNATURE,
            name,
            "expected a P-256 signature of 64 bytes",
        )
        half = _SIGNATURE // 2
        der = encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
        try:
            if isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(der, self._held[name].encode(), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise CollateralInvalid(name, "its signature is not its signer's") from error
        value = json.loads(self._held[name])
        if not isinstance(value, dict):
            raise CollateralInvalid(name, "expected a JSON object")
        self._times(name, _time(value["issueDate"]), _time(value["nextUpdate"]))
        return value

    def _times(self, part: str, begins: datetime, ends: datetime, *, issue: bool = True) -> None:
        _require(begins <= self._now, part, f"it is valid only from {begins:%Y-%m-%dT%H:%M:%SZ} on")
        _require(self._now < ends, part, f"it expired at {ends:%Y-%m-%dT%H:%M:%SZ}")
        if issue:
            self._from.append(begins)
        self._until.append(ends)


async def fetch_collateral(fetch: Fetch, fmspc: str, authority: str) -> str:
    """Everything that verifies a quote of this platform, in dcap-qvl's JSON. Nothing is verified yet.

    Raises:
        CollateralUnavailable: A part is missing or malformed.
    """
    sgx, tdx = "/sgx/certification/v4", "/tdx/certification/v4"
    pck_crl, pck_head = await fetch(f"{sgx}/pckcrl?ca={authority}&encoding=der")
    root_crl, _ = await fetch(f"{sgx}/rootcacrl")
    tcb, tcb_head = await fetch(f"{tdx}/tcb?fmspc={fmspc}")
    identity, identity_head = await fetch(f"{tdx}/qe/identity?update=standard")
    try:
        tcb_info, tcb_signature = _parts(tcb, "tcbInfo")
        qe_identity, qe_signature = _parts(identity, "enclaveIdentity")
        chains = [
            unquote(_header(head, name))
            for head, name in (
                (pck_head, "SGX-PCK-CRL-Issuer-Chain"),
                (tcb_head, "TCB-Info-Issuer-Chain"),
                (identity_head, "SGX-Enclave-Identity-Issuer-Chain"),
            )
        ]
        root_hex = root_crl.hex() if root_crl[:1] == b"\x30" else root_crl.decode("ascii").strip()
    except (ValueError, KeyError, RecursionError) as error:
        raise CollateralUnavailable(
            f"the collateral service's answer cannot be used: {_line(error)}"
        ) from error
    return json.dumps(
        {
            "pck_crl_issuer_chain": chains[0],
            "root_ca_crl": root_hex,
            "pck_crl": pck_crl.hex(),
            "tcb_info_issuer_chain": chains[1],
            "tcb_info": tcb_info,
            "tcb_info_signature": tcb_signature,
            "qe_identity_issuer_chain": chains[2],
            "qe_identity": qe_identity,
            "qe_identity_signature": qe_signature,
        }
    )


def from_pccs(url: str) -> Fetch:
    """A PCCS, or Intel's own service."""

    async def fetch(path: str) -> tuple[bytes, dict[str, str]]:
        try:
            timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
            async with (
                aiohttp.ClientSession(timeout=timeout) as http,
                http.get(url + path, allow_redirects=False) as response,
            ):
                body = await response.content.read(_MAX)
                while len(body) < _MAX and (more := await response.content.read(_MAX - len(body))):
                    body += more
                if response.status != _OK:
                    raise CollateralUnavailable(f"GET {url}{path}: HTTP {response.status}")
                return body, dict(response.headers)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            why = str(error) or type(error).__name__
            raise CollateralUnavailable(f"no answer from the collateral service {url}: {why}") from error

    return fetch


def _parts(answer: bytes, key: str) -> tuple[str, str]:
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


def _time(value: Any) -> datetime:
    moment = datetime.fromisoformat(str(value))
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _require(holds: bool, part: str, detail: str) -> None:
    if not holds:
        raise CollateralInvalid(part, detail)


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
