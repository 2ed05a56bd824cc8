"""The VMM's private key hierarchy, shaped like Intel's: root, PCK CA, PCK, TCB signer; made once, kept 0600.

Every certificate says SIMULATED in its organisation. Structure: Intel SGX PCK Certificate and CRL Profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from platform_vmm.state import write_durably

FMSPC = bytes.fromhex("50806f000000")
PPID = bytes.fromhex("5151514c41544544564d4d0000000000")
PCE_ID = bytes(2)
_SGX_EXTENSION = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
_SGX_OID = bytes.fromhex("060a2a864886f84d010d01")
_YEARS = timedelta(days=3650)
_ORGANISATION = "SIMULATED by platform-vmm: not a TEE"
_CRL_URL = "https://simulated.invalid/crl"


@dataclass(frozen=True, slots=True)
class Pki:
    """Certificates and the keys that sign quotes and collateral."""

    root: x509.Certificate
    root_key: ec.EllipticCurvePrivateKey
    platform_ca: x509.Certificate
    platform_ca_key: ec.EllipticCurvePrivateKey
    pck: x509.Certificate
    pck_key: ec.EllipticCurvePrivateKey
    signer: x509.Certificate
    signer_key: ec.EllipticCurvePrivateKey

    @property
    def pck_chain(self) -> bytes:
        """PEM: PCK, PCK CA, root."""
        return b"".join(_pem(one) for one in (self.pck, self.platform_ca, self.root))

    @property
    def pck_crl_chain(self) -> bytes:
        """PEM: PCK CA, root."""
        return _pem(self.platform_ca) + _pem(self.root)

    @property
    def signer_chain(self) -> bytes:
        """PEM: TCB signer, root."""
        return _pem(self.signer) + _pem(self.root)

    def root_crl(self, now: datetime) -> bytes:
        """The root's CRL, DER, empty."""
        return _crl(self.root, self.root_key, now)

    def pck_crl(self, now: datetime) -> bytes:
        """The PCK CA's CRL, DER, empty."""
        return _crl(self.platform_ca, self.platform_ca_key, now)


def load_pki(state: Path, now: datetime | None = None) -> Pki:
    """The hierarchy under `state/simulation`, made at the first call; its root as `simulated-root.pem`."""
    folder = state / "simulation"
    folder.mkdir(mode=0o700, exist_ok=True)
    names = ("root", "platform_ca", "pck", "signer")
    if not all((folder / f"{name}.pem").exists() for name in names):
        _write(folder, _make(now or datetime.now(UTC)))
    parts: list[tuple[x509.Certificate, ec.EllipticCurvePrivateKey]] = []
    for name in names:
        data = (folder / f"{name}.pem").read_bytes()
        key = serialization.load_pem_private_key(data, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError(f"{folder / name}.pem has no EC key: remove {folder} to make the hierarchy anew")
        parts.append((x509.load_pem_x509_certificate(data), key))
    (root, root_key), (ca, ca_key), (pck, pck_key), (signer, signer_key) = parts
    write_durably(state / "simulated-root.pem", _pem(root).decode(), 0o644)
    return Pki(root, root_key, ca, ca_key, pck, pck_key, signer, signer_key)


def _make(now: datetime) -> dict[str, tuple[x509.Certificate, ec.EllipticCurvePrivateKey]]:
    keys = {
        name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "platform_ca", "pck", "signer")
    }
    root_name, ca_name = _name("Intel SGX Root CA"), _name("Intel SGX PCK Platform CA")

    def certificate(
        name: str, subject: x509.Name, issuer: x509.Name, signed_by: str, path: int | None
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(keys[name].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + _YEARS)
            .add_extension(x509.BasicConstraints(ca=path is not None, path_length=path), critical=True)
            .add_extension(_usage(ca=path is not None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[name].public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[signed_by].public_key()),
                critical=False,
            )
            .add_extension(_distribution(), critical=False)
        )
        if name == "pck":
            builder = builder.add_extension(
                x509.UnrecognizedExtension(_SGX_EXTENSION, _pck_extension()), critical=False
            )
        return builder.sign(keys[signed_by], hashes.SHA256())

    return {
        "root": (certificate("root", root_name, root_name, "root", 1), keys["root"]),
        "platform_ca": (certificate("platform_ca", ca_name, root_name, "root", 0), keys["platform_ca"]),
        "pck": (
            certificate("pck", _name("Intel SGX PCK Certificate"), ca_name, "platform_ca", None),
            keys["pck"],
        ),
        "signer": (
            certificate("signer", _name("Intel SGX TCB Signing"), root_name, "root", None),
            keys["signer"],
        ),
    }


def _write(folder: Path, made: dict[str, tuple[x509.Certificate, ec.EllipticCurvePrivateKey]]) -> None:
    for name, (certificate, key) in made.items():
        data = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_durably(folder / f"{name}.pem", (data + _pem(certificate)).decode())


def _crl(issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey, now: datetime) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(now - timedelta(hours=1))
        .next_update(now + timedelta(days=30))
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANISATION),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
        ]
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=not ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _distribution() -> x509.CRLDistributionPoints:
    return x509.CRLDistributionPoints(
        [x509.DistributionPoint([x509.UniformResourceIdentifier(_CRL_URL)], None, None, None)]
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pck_extension() -> bytes:
    """(OID, value): PPID .1, TCB .2 (16 SVNs, PCESVN .17, CPUSVN .18), PCEID .3, FMSPC .4, type .5."""
    svns = [_pair([2, index], _integer(1)) for index in range(1, 17)]
    tcb = _sequence(b"".join([*svns, _pair([2, 17], _integer(11)), _pair([2, 18], _octets(bytes([1]) * 16))]))
    fields = [
        _pair([1], _octets(PPID)),
        _pair([2], tcb),
        _pair([3], _octets(PCE_ID)),
        _pair([4], _octets(FMSPC)),
        _pair([5], b"\x0a\x01\x00"),
    ]
    return _sequence(b"".join(fields))


def _pair(arcs: list[int], value: bytes) -> bytes:
    body = _SGX_OID[2:] + bytes(arcs)
    return _sequence(b"\x06" + bytes([len(body)]) + body + value)


def _integer(value: int) -> bytes:
    return bytes([2, 1, value])


def _octets(value: bytes) -> bytes:
    return bytes([4, len(value)]) + value


def _sequence(body: bytes) -> bytes:
    size = len(body)
    head = bytes([size]) if size < 128 else bytes([0x82, size >> 8, size & 0xFF])  # noqa: PLR2004 - DER lengths
    return b"\x30" + head + body
