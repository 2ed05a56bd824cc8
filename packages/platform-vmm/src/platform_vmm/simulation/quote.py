"""Simulated TDX quotes (version 4, TD 1.0 body) and the collateral under which they verify.

Layout: Intel TDX DCAP Quoting Library API, quote version 4. The signatures are real, the root is ours.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from platform_vmm.simulation.pki import FMSPC, PCE_ID, Pki

_QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
_TDX = 0x81
_QE_SVN = 8
_QE_AUTH = bytes(range(32))
_TEE_TCB_SVN = bytes([5, 1, 2] + [0] * 13)
_TD_ATTRIBUTES = bytes.fromhex("0000001000000000")
_XFAM = bytes.fromhex("e702060000000000")
_MRSIGNER = bytes(32)


@dataclass(frozen=True, slots=True)
class Measurements:
    """What a simulated TD measures: MRTD, RTMR 0 to 3 (48 bytes each) and mr_config_id (48 bytes)."""

    mrtd: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    mr_config_id: bytes


def make_quote(pki: Pki, measured: Measurements, report_data: bytes) -> bytes:
    """A quote over up to 64 bytes of report data, zero-padded on the right."""
    attestation_key = ec.generate_private_key(ec.SECP256R1())
    header = (
        (4).to_bytes(2, "little")
        + (2).to_bytes(2, "little")
        + _TDX.to_bytes(4, "little")
        + bytes(4)
        + _QE_VENDOR
        + bytes(20)
    )
    body = _body(measured, report_data.ljust(64, b"\x00"))
    public = _public(attestation_key)
    qe_report = _qe_report(hashlib.sha256(public + _QE_AUTH).digest())
    inner = (
        qe_report
        + _signature(pki.pck_key, qe_report)
        + len(_QE_AUTH).to_bytes(2, "little")
        + _QE_AUTH
        + (5).to_bytes(2, "little")
        + len(pki.pck_chain).to_bytes(4, "little")
        + pki.pck_chain
    )
    outer = (
        _signature(attestation_key, header + body)
        + public
        + (6).to_bytes(2, "little")
        + len(inner).to_bytes(4, "little")
        + inner
    )
    return header + body + len(outer).to_bytes(4, "little") + outer


def tcb_info(pki: Pki, now: datetime) -> tuple[str, str]:
    """(TCB info as signed JSON text, signature in hex)."""
    level = {
        "tcb": {
            "sgxtcbcomponents": [{"svn": 1} for _ in range(16)],
            "pcesvn": 11,
            "tdxtcbcomponents": [{"svn": svn} for svn in _TEE_TCB_SVN],
        },
        "tcbDate": _time(now - timedelta(days=30)),
        "tcbStatus": "UpToDate",
    }
    info = {
        "id": "TDX",
        "version": 3,
        "issueDate": _time(now - timedelta(hours=1)),
        "nextUpdate": _time(now + timedelta(days=30)),
        "fmspc": FMSPC.hex().upper(),
        "pceId": PCE_ID.hex(),
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
                    {
                        "tcb": {"isvsvn": _TEE_TCB_SVN[0]},
                        "tcbDate": _time(now - timedelta(days=30)),
                        "tcbStatus": "UpToDate",
                    }
                ],
            }
        ],
        "tcbLevels": [level],
    }
    return _signed(pki, info)


def qe_identity(pki: Pki, now: datetime) -> tuple[str, str]:
    """(QE identity as signed JSON text, signature in hex)."""
    identity = {
        "id": "TD_QE",
        "version": 2,
        "issueDate": _time(now - timedelta(hours=1)),
        "nextUpdate": _time(now + timedelta(days=30)),
        "tcbEvaluationDataNumber": 17,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": _MRSIGNER.hex().upper(),
        "isvprodid": 2,
        "tcbLevels": [
            {
                "tcb": {"isvsvn": _QE_SVN},
                "tcbDate": _time(now - timedelta(days=30)),
                "tcbStatus": "UpToDate",
            }
        ],
    }
    return _signed(pki, identity)


def collateral(pki: Pki, now: datetime) -> dict[str, str]:
    """Everything that a verifier needs, in dcap-qvl's collateral form."""
    info, info_signature = tcb_info(pki, now)
    identity, identity_signature = qe_identity(pki, now)
    return {
        "pck_crl_issuer_chain": pki.pck_crl_chain.decode(),
        "root_ca_crl": pki.root_crl(now).hex(),
        "pck_crl": pki.pck_crl(now).hex(),
        "tcb_info_issuer_chain": pki.signer_chain.decode(),
        "tcb_info": info,
        "tcb_info_signature": info_signature,
        "qe_identity_issuer_chain": pki.signer_chain.decode(),
        "qe_identity": identity,
        "qe_identity_signature": identity_signature,
    }


def _body(measured: Measurements, report_data: bytes) -> bytes:
    return b"".join(
        [
            _TEE_TCB_SVN,
            bytes(48),
            bytes(48),
            bytes(8),
            _TD_ATTRIBUTES,
            _XFAM,
            measured.mrtd,
            measured.mr_config_id,
            bytes(48),
            bytes(48),
            *measured.rtmrs,
            report_data,
        ]
    )


def _qe_report(bound: bytes) -> bytes:
    report = bytearray(384)
    report[48:64] = bytes.fromhex("11000000000000000000000000000000")
    report[128:160] = _MRSIGNER
    report[256:258] = (2).to_bytes(2, "little")
    report[258:260] = _QE_SVN.to_bytes(2, "little")
    report[320:352] = bound
    return bytes(report)


def _signed(pki: Pki, value: dict[str, object]) -> tuple[str, str]:
    text = json.dumps(value, separators=(",", ":"))
    return text, _signature(pki.signer_key, text.encode()).hex()


def _signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    point = key.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
    return point[1:]


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
