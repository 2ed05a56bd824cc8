"""A real TDX quote (`data/tdx`), the clock put where its collateral was valid, and the policy over it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote as percent

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from platform_protocol.platform_messages import IsolationLevel
from platform_validator.attestation.collateral import CollateralUnavailable, Fetch
from platform_validator.attestation.collateral_cache import CollateralCache
from platform_validator.attestation.os_image import KnownImages, Pinned, Shape
from platform_validator.attestation.policy import (
    AttestationPolicy,
    AttestationRules,
    Expected,
    find_faults,
)
from platform_validator.attestation.quote import (
    QuoteChecker,
    VerifiedQuote,
    verify_quote,
)
from platform_validator.clock import SystemClock

DATA = Path(__file__).parents[1] / "data" / "tdx"
REPORT = json.loads((DATA / "dstack_quote_report.json").read_text())
QUOTE = bytes.fromhex(REPORT["quote"])
EVENT_LOG = str(REPORT["event_log"])
COLLATERAL = (DATA / "dstack_collateral.json").read_text()
VALID = datetime(2026, 3, 1, tzinfo=UTC)
COMPOSE_HASH = "3763bc34552cf3a27ff71ad5f7a90471562a1a2df552dfc1998cba2d60da27e7"
INSTANCE = "c3714eb66990eace777b4e664c16e09375dec4c9"
REPORT_DATA = bytes.fromhex("1234").ljust(64, b"\x00")
SHAPE = Shape(16, 65536, 1)
EXPECTED = Expected(COMPOSE_HASH, REPORT_DATA, image="dstack-nvidia", shape=SHAPE, key_provider="local-sgx")


class At(SystemClock):
    """A clock that stands still."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment
        self.elapsed = 0.0

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return self.elapsed


class Pccs:
    """A collateral service made of the vector's own collateral."""

    def __init__(self, text: str = COLLATERAL) -> None:
        self.held = json.loads(text)
        self.asked: list[str] = []
        self.down = False

    async def fetch(self, path: str) -> tuple[bytes, dict[str, str]]:
        self.asked.append(path)
        if self.down:
            raise CollateralUnavailable("no answer")
        held = self.held
        if "pckcrl" in path:
            return bytes.fromhex(held["pck_crl"]), {
                "SGX-PCK-CRL-Issuer-Chain": percent(held["pck_crl_issuer_chain"])
            }
        if "rootcacrl" in path:
            return held["root_ca_crl"].encode(), {}
        if "/tcb?" in path:
            body = f'{{"tcbInfo":{held["tcb_info"]},"signature":"{held["tcb_info_signature"]}"}}'
            return body.encode(), {"tcb-info-issuer-chain": percent(held["tcb_info_issuer_chain"])}
        body = f'{{"enclaveIdentity":{held["qe_identity"]},"signature":"{held["qe_identity_signature"]}"}}'
        return body.encode(), {"SGX-Enclave-Identity-Issuer-Chain": percent(held["qe_identity_issuer_chain"])}


def verified() -> VerifiedQuote:
    return verify_quote(QUOTE, COLLATERAL, VALID, None)


def known() -> KnownImages:
    """What the machine of the vector booted to."""
    body = verified().body
    rtmr0, rtmr1, rtmr2, _ = (one.hex() for one in body.rtmrs)
    pinned = Pinned("dstack-nvidia", SHAPE, body.mrtd.hex(), rtmr0, rtmr1, rtmr2, "the vector")
    return KnownImages((pinned,))


RULES = AttestationRules(images=known)


def checker(
    fetch: Fetch | None = None, *, clock: At | None = None, root: bytes | None = None
) -> QuoteChecker:
    clock = clock or At(VALID)
    cache = CollateralCache(fetch=fetch or Pccs().fetch, clock=clock, root=root)
    return QuoteChecker(collateral=cache, clock=clock, root=root)


def policy(fetch: Fetch | None = None) -> AttestationPolicy:
    return AttestationPolicy(
        level=IsolationLevel.TEE,
        allow_simulated=False,
        checker=checker(fetch),
        rules=RULES,
        clock=At(VALID),
    )


def faults_of(quote: VerifiedQuote, log: str = EVENT_LOG) -> list[str]:
    """The names of the checks that fail."""
    return [check.value for check, _ in find_faults(quote, log, EXPECTED, RULES, now=VALID)[1]]


def another_root() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Intel SGX Root CA")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(VALID - timedelta(days=1))
        .not_valid_after(VALID + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.DER)
