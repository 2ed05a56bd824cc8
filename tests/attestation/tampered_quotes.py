"""Tampering with quotes: real ones, a byte at a time, and generated ones that say something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

from tests.attestation import evidence as ev
from tests.attestation import forge
from tests.attestation.case import Case, Make, signed, td
from tests.attestation.evidence import Evidence, World


def quotes() -> Iterator[Case]:
    """All of them."""
    yield from _real_bytes()
    yield from _quote()


# A real quote, one byte of one field changed: nothing but its signature can notice, and it does.

_BODY = {
    "TEE TCB SVN": 48,
    "MRSEAM": 64,
    "MRSIGNERSEAM": 112,
    "SEAM attributes": 160,
    "TD attributes": 168,
    "XFAM": 176,
    "MRTD": 184,
    "MRCONFIGID": 232,
    "MROWNER": 280,
    "MROWNERCONFIG": 328,
    "RTMR0": 376,
    "RTMR1": 424,
    "RTMR2": 472,
    "RTMR3": 520,
    "report data": 568,
}
_REST = {
    "version": (0, "quote_format"),
    "attestation key type": (2, "quote_format"),
    "TEE type": (4, "quote_format"),
    "QE vendor": (12, "quote_format"),
    "user data": (28, "quote_signature"),
    "signature": (636, "quote_signature"),
    "attestation key": (700, "qe_report"),
    "QE report, CPUSVN": (770, "qe_report"),
    "QE report, MRENCLAVE": (834, "qe_report"),
    "QE report, report data": (1090, "qe_report"),
    "QE report signature": (1154, "qe_report"),
    "QE authentication data": (1220, "qe_report"),
    "length of the authentication": (632, "quote_format"),
    "type of the certification data": (764, "quote_format"),
    "length of the certification data": (766, "quote_format"),
    "length of the QE authentication data": (1218, "quote_format"),
    "type of the certificates": (1252, "quote_format"),
    "length of the certificates": (1254, "quote_format"),
}


def _real_bytes() -> Iterator[Case]:
    flips = {name: (offset, "quote_signature") for name, offset in _BODY.items()} | _REST
    for name, (offset, check) in flips.items():
        yield Case("real quote", name, f"refused {check}", _flipped(offset))
    yield Case("real quote", "cut short", "refused quote_format", _cut)
    yield Case("real quote", "followed by other bytes", "refused quote_format", _followed)
    yield Case("real quote", "its PCK certificate", "refused pck_chain", _certificate)
    yield Case("real quote", "another root", "refused pck_chain", _another_root)
    yield Case("real quote", "later than its collateral", "unavailable pck_crl", _later)
    yield Case("real quote", "earlier than its collateral", "unavailable pck_crl", _earlier)
    yield Case("real quote", "none at all", "unavailable quote", _none)


def _flipped(offset: int) -> Make:
    def make(_: World) -> Evidence:
        real = ev.real_dstack()
        changed = bytearray(real.quote or b"")
        changed[offset] ^= 1
        return replace(real, quote=bytes(changed))

    return make


def _cut(_: World) -> Evidence:
    real = ev.real_dstack()
    return replace(real, quote=(real.quote or b"")[:2000])


def _followed(_: World) -> Evidence:
    real = ev.real_dstack()
    return replace(real, quote=(real.quote or b"") + b"\x01")


def _certificate(_: World) -> Evidence:
    real = ev.real_dstack()
    raw = bytearray(real.quote or b"")
    # Into the base64 of the first certificate's signature: it stays a certificate, of somebody else's hand.
    at = raw.index(b"-----END CERTIFICATE-----") - 20
    raw[at] = ord("A") if raw[at] != ord("A") else ord("B")
    return replace(real, quote=bytes(raw))


def _another_root(world: World) -> Evidence:
    return replace(ev.real_dstack(), root=world.pki.root.der)


def _later(_: World) -> Evidence:
    real = ev.real_dstack()
    return replace(real, now=real.now + timedelta(days=25))


def _earlier(_: World) -> Evidence:
    real = ev.real_dstack()
    return replace(real, now=real.now - timedelta(days=60))


def _none(_: World) -> Evidence:
    return replace(ev.real_dstack(), quote=None)


# Generated quotes, whose signatures are right: what they say is not.


def _quote() -> Iterator[Case]:
    attributes = {
        "debug bit": ("0100001000000000", "debug"),
        "reserved attribute": ("0200001000000000", "td_attributes"),
        "SEPT_VE_DISABLE off": ("0000000000000000", "td_attributes"),
    }
    for name, (value, check) in attributes.items():
        yield td("quote", name, check, attributes=bytes.fromhex(value))
    yield td("quote", "service TD", "service_td", service_td=b"s" * 48)
    yield signed("quote", "signed by another key than it shows", "quote_signature", shown_key=forge.new_key())
    yield signed("quote", "QE report signed by another PCK", "qe_report", qe_key=forge.new_key())
    yield signed("quote", "version 3", "quote_format", version=3)
    yield signed("quote", "P-384 key", "quote_format", key_type=3)
    yield signed("quote", "SGX", "quote_format", tee_type=0)
    yield signed("quote", "another quoting enclave's vendor", "quote_format", vendor=bytes(16))
    reports = {
        "QE of another signer": (128, 1, "qe_identity"),
        "QE of another product": (256, 7, "qe_identity"),
        "QE in debug mode": (48, 2, "qe_identity"),
        "QE with another MISCSELECT": (16, 1, "qe_identity"),
        "QE with other attributes": (48, 0x20, "qe_identity"),
        "QE too old": (258, 8, "tcb_status"),
        "QE binds another key": (320, 1, "qe_report"),
    }
    for name, (at, bits, check) in reports.items():
        yield signed("quote", name, check, qe_report=_xor(at, bits))


def _xor(at: int, bits: int) -> Callable[[bytearray], None]:
    def change(report: bytearray) -> None:
        report[at] ^= bits

    return change
