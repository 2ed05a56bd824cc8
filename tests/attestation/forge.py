"""Makes quotes and collateral under a private hierarchy, shaped like Intel's, all of which can be bent.

Layouts: Intel TDX DCAP Quoting Library API (quotes 4 and 5), Intel SGX PCK Certificate and CRL Profile, PCS
API version 4. The signatures are real; nothing here is accepted under Intel's root.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
FMSPC = bytes.fromhex("70a06d070000")
TCB_SVN = bytes([6, 1, 3] + [0] * 13)
TD_ATTRIBUTES = bytes.fromhex("0000001000000000")
QE_AUTH = bytes(range(32))
_QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_QE_SIGNER = bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5")
_SGX = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
_SGX_DER = bytes.fromhex("2a864886f84d010d01")
_PEM = serialization.Encoding.PEM
_DER = serialization.Encoding.DER

Key = ec.EllipticCurvePrivateKey


def new_key() -> Key:
    """Somebody's."""
    return ec.generate_private_key(ec.SECP256R1())


@dataclass(slots=True)
class Entity:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(_PEM).decode()

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(_DER)


def issue(
    name: str,
    issuer: Entity | None,
    *,
    ca: bool,
    fmspc: bytes | None = None,
    begins: datetime = NOW - timedelta(days=365),
    ends: datetime = NOW + timedelta(days=3650),
    signed_by: Key | None = None,
) -> Entity:
    """A certificate; self-signed without an issuer. `fmspc` makes it a PCK certificate."""
    key = new_key()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Made for tests"),
        ]
    )
    above = issuer or Entity(None, key)  # type: ignore[arg-type] # its own issuer: the name is the subject's
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not ca,
                content_commitment=not ca,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=ca,
                crl_sign=ca,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(above.key.public_key()), critical=False
        )
        .add_extension(
            x509.CRLDistributionPoints(
                [
                    x509.DistributionPoint(
                        [x509.UniformResourceIdentifier("https://tests.invalid/crl")], None, None, None
                    )
                ]
            ),
            critical=False,
        )
    )
    if fmspc is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(_SGX, _sgx(fmspc)), critical=False)
    return Entity(builder.sign(signed_by or above.key, hashes.SHA256()), key)


@dataclass(slots=True)
class Hierarchy:
    """Root, PCK CA, PCK and TCB signer."""

    root: Entity
    ca: Entity
    pck: Entity
    signer: Entity

    @classmethod
    def make(cls) -> Hierarchy:
        root = issue("Intel SGX Root CA", None, ca=True)
        ca = issue("Intel SGX PCK Platform CA", root, ca=True)
        return cls(
            root,
            ca,
            issue("Intel SGX PCK Certificate", ca, ca=False, fmspc=FMSPC),
            issue("Intel SGX TCB Signing", root, ca=False),
        )

    def crl(
        self,
        issuer: Entity,
        *revoked: Entity,
        begins: datetime = NOW - timedelta(days=1),
        ends: datetime = NOW + timedelta(days=30),
        signed_by: Key | None = None,
    ) -> str:
        """Of an issuer, hex."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.certificate.subject)
            .last_update(begins)
            .next_update(ends)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False
            )
        )
        for one in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(one.certificate.serial_number)
                .revocation_date(begins)
                .build()
            )
        return builder.sign(signed_by or issuer.key, hashes.SHA256()).public_bytes(_DER).hex()


def signature(key: Key, data: bytes) -> bytes:
    """The two halves, r and s."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def signed(key: Key, value: dict[str, Any]) -> tuple[str, str]:
    """(JSON text, signature in hex)."""
    text = json.dumps(value, separators=(",", ":"))
    return text, signature(key, text.encode()).hex()


def when(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def tcb_info() -> dict[str, Any]:
    """TCB info under which the platform is up to date; a newer level than the platform's can be put first."""
    return {
        "id": "TDX",
        "version": 3,
        "issueDate": when(NOW - timedelta(days=1)),
        "nextUpdate": when(NOW + timedelta(days=30)),
        "fmspc": FMSPC.hex().upper(),
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": 17,
        "tdxModule": {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8},
        "tdxModuleIdentities": [
            {
                "id": "TDX_01",
                "mrsigner": "00" * 48,
                "attributes": "00" * 8,
                "attributesMask": "FF" * 8,
                "tcbLevels": [
                    {"tcb": {"isvsvn": 6}, "tcbDate": "2025-01-01T00:00:00Z", "tcbStatus": "UpToDate"}
                ],
            }
        ],
        "tcbLevels": [tcb_level("UpToDate")],
    }


def tcb_level(
    status: str, *, date: str = "2025-01-01T00:00:00Z", svn: int = 1, advisories: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A level; the platform is at SVN 1 everywhere."""
    return {
        "tcb": {
            "sgxtcbcomponents": [{"svn": svn} for _ in range(16)],
            "pcesvn": 11,
            "tdxtcbcomponents": [{"svn": one} for one in TCB_SVN],
        },
        "tcbDate": date,
        "tcbStatus": status,
        "advisoryIDs": list(advisories),
    }


def qe_identity() -> dict[str, Any]:
    return {
        "id": "TD_QE",
        "version": 2,
        "issueDate": when(NOW - timedelta(days=1)),
        "nextUpdate": when(NOW + timedelta(days=30)),
        "tcbEvaluationDataNumber": 17,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": _QE_SIGNER.hex().upper(),
        "isvprodid": 2,
        "tcbLevels": [{"tcb": {"isvsvn": 8}, "tcbDate": "2025-01-01T00:00:00Z", "tcbStatus": "UpToDate"}],
    }


def collateral(
    pki: Hierarchy, *, info: dict[str, Any] | None = None, identity: dict[str, Any] | None = None
) -> dict[str, str]:
    """Valid at NOW, in dcap-qvl's form."""
    info_text, info_signature = signed(pki.signer.key, info or tcb_info())
    identity_text, identity_signature = signed(pki.signer.key, identity or qe_identity())
    return {
        "pck_crl_issuer_chain": pki.ca.pem + pki.root.pem,
        "root_ca_crl": pki.crl(pki.root),
        "pck_crl": pki.crl(pki.ca),
        "tcb_info_issuer_chain": pki.signer.pem + pki.root.pem,
        "tcb_info": info_text,
        "tcb_info_signature": info_signature,
        "qe_identity_issuer_chain": pki.signer.pem + pki.root.pem,
        "qe_identity": identity_text,
        "qe_identity_signature": identity_signature,
    }


@dataclass(frozen=True, slots=True)
class Td:
    """What a TD report says; `service_td` makes it version 1.5 in a quote of version 5."""

    mrtd: bytes = hashlib.sha384(b"firmware").digest()
    rtmrs: tuple[bytes, bytes, bytes, bytes] = (bytes(48), bytes(48), bytes(48), bytes(48))
    report_data: bytes = bytes(64)
    tcb_svn: bytes = TCB_SVN
    mr_seam: bytes = hashlib.sha384(b"module").digest()
    signer_seam: bytes = bytes(48)
    seam_attributes: bytes = bytes(8)
    attributes: bytes = TD_ATTRIBUTES
    xfam: bytes = bytes.fromhex("e702060000000000")
    mr_config_id: bytes = bytes(48)
    mr_owner: bytes = bytes(48)
    mr_owner_config: bytes = bytes(48)
    service_td: bytes | None = None

    def packed(self) -> bytes:
        head = self.tcb_svn + self.mr_seam + self.signer_seam + self.seam_attributes + self.attributes
        measured = self.xfam + self.mrtd + self.mr_config_id + self.mr_owner + self.mr_owner_config
        body = head + measured + b"".join(self.rtmrs) + self.report_data
        return body if self.service_td is None else body + self.tcb_svn + self.service_td


@dataclass(frozen=True, slots=True)
class QuoteParts:
    """How a quote is signed; each part can be another one's."""

    qe_report: Callable[[bytearray], None] = field(default=lambda _report: None)
    qe_key: Key | None = None
    qe_auth: bytes = QE_AUTH
    chain: tuple[Entity, ...] | None = None
    attestation_key: Key | None = None
    shown_key: Key | None = None
    version: int | None = None
    key_type: int = 2
    tee_type: int = 0x81
    vendor: bytes = _QE_VENDOR
    user_data: bytes = bytes(20)


def quote(pki: Hierarchy, td: Td, parts: QuoteParts | None = None) -> bytes:
    """A quote of version 4, or 5 for a TD 1.5."""
    parts = parts or QuoteParts()
    key = parts.attestation_key or new_key()
    version = parts.version or (4 if td.service_td is None else 5)
    header = version.to_bytes(2, "little") + parts.key_type.to_bytes(2, "little")
    header += parts.tee_type.to_bytes(4, "little") + bytes(4) + parts.vendor + parts.user_data
    body = td.packed()
    if version == 5:
        body = (
            (2 if td.service_td is None else 3).to_bytes(2, "little") + len(body).to_bytes(4, "little") + body
        )
    public = (parts.shown_key or key).public_key()
    point = public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)[1:]
    report = _qe_report(hashlib.sha256(point + parts.qe_auth).digest())
    parts.qe_report(report)
    chain = "".join(one.pem for one in parts.chain or (pki.pck, pki.ca, pki.root)).encode()
    inner = bytes(report) + signature(parts.qe_key or pki.pck.key, bytes(report))
    inner += len(parts.qe_auth).to_bytes(2, "little") + parts.qe_auth
    inner += (5).to_bytes(2, "little") + len(chain).to_bytes(4, "little") + chain
    outer = signature(key, header + body) + point
    outer += (6).to_bytes(2, "little") + len(inner).to_bytes(4, "little") + inner
    return header + body + len(outer).to_bytes(4, "little") + outer


def _qe_report(bound: bytes) -> bytearray:
    report = bytearray(384)
    report[48:64] = bytes.fromhex("11000000000000000000000000000000")
    report[128:160] = _QE_SIGNER
    report[256:258] = (2).to_bytes(2, "little")
    report[258:260] = (8).to_bytes(2, "little")
    report[320:352] = bound
    return report


def _sgx(fmspc: bytes) -> bytes:
    """The SGX extension of a PCK certificate: PPID .1, TCB .2, PCE id .3, FMSPC .4, type .5."""
    svns = b"".join(_pair([2, one], b"\x02\x01\x01") for one in range(1, 17))
    tcb = _sequence(svns + _pair([2, 17], b"\x02\x01\x0b") + _pair([2, 18], b"\x04\x10" + b"\x01" * 16))
    return _sequence(
        _pair([1], b"\x04\x10" + b"made for tests!!")
        + _pair([2], tcb)
        + _pair([3], b"\x04\x02\x00\x00")
        + _pair([4], b"\x04\x06" + fmspc)
        + _pair([5], b"\x0a\x01\x00")
    )


def _pair(arcs: list[int], value: bytes) -> bytes:
    oid = _SGX_DER + bytes(arcs)
    return _sequence(b"\x06" + bytes([len(oid)]) + oid + value)


def _sequence(body: bytes) -> bytes:
    size = len(body)
    head = bytes([size]) if size < 128 else bytes([0x82, size >> 8, size & 0xFF])
    return b"\x30" + head + body


def with_register(td: Td, number: int, value: bytes) -> Td:
    """Another RTMR."""
    registers = list(td.rtmrs)
    registers[number] = value
    return replace(td, rtmrs=(registers[0], registers[1], registers[2], registers[3]))
