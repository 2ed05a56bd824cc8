"""Tampering with certificates, CRLs, TCB info, QE identity and the TDX module."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from tests.attestation import forge
from tests.attestation.case import Case, Make, td
from tests.attestation.evidence import Evidence, World


def collateral() -> Iterator[Case]:
    """All of them."""
    yield from _certificates()
    yield from _crls()
    yield from _tcb()
    yield from _identity()
    yield from _module()


# Certificates


def _certificates() -> Iterator[Case]:
    def pck(**how: Any) -> Make:
        def make(world: World) -> Evidence:
            fmspc = how.pop("fmspc", forge.FMSPC)
            one = forge.issue("Intel SGX PCK Certificate", world.pki.ca, ca=False, fmspc=fmspc, **how)
            how["fmspc"] = fmspc
            parts = forge.QuoteParts(chain=(one, world.pki.ca, world.pki.root), qe_key=one.key)
            return world.evidence(parts=parts)

        return make

    day = timedelta(days=1)
    chain = "refused pck_chain"
    yield Case("certificates", "PCK expired", chain, pck(ends=forge.NOW - day))
    yield Case("certificates", "PCK not valid yet", chain, pck(begins=forge.NOW + day))
    yield Case("certificates", "PCK signed by another", chain, pck(signed_by=forge.new_key()))
    yield Case("certificates", "PCK without Intel's extension", chain, pck(fmspc=None))
    yield Case("certificates", "PCK of another platform", "unavailable platform", pck(fmspc=bytes(6)))
    yield Case("certificates", "a self-made hierarchy of the same names", chain, _self_made)
    yield Case("certificates", "no PCK CA between", chain, _no_ca)
    yield Case("certificates", "PCK CA expired", "unavailable signer", _ca(ends=forge.NOW - day))
    yield Case("certificates", "PCK CA signed by another", chain, _ca(signed_by=forge.new_key()))
    yield Case("certificates", "TCB signer expired", "unavailable signer", _signer(ends=forge.NOW - day))
    yield Case(
        "certificates",
        "TCB signer signed by another",
        "unavailable signer",
        _signer(signed_by=forge.new_key()),
    )
    yield Case("certificates", "collateral under another root", "unavailable root", _other_collateral)


def _self_made(world: World) -> Evidence:
    other = forge.Hierarchy.make()
    parts = forge.QuoteParts(chain=(other.pck, other.ca, other.root), qe_key=other.pck.key)
    return world.evidence(parts=parts)


def _no_ca(world: World) -> Evidence:
    return world.evidence(parts=forge.QuoteParts(chain=(world.pki.pck, world.pki.root)))


def _ca(**how: Any) -> Make:
    def make(world: World) -> Evidence:
        ca = forge.issue("Intel SGX PCK Platform CA", world.pki.root, ca=True, **how)
        pck = forge.issue("Intel SGX PCK Certificate", ca, ca=False, fmspc=forge.FMSPC)
        held = {"pck_crl_issuer_chain": ca.pem + world.pki.root.pem, "pck_crl": world.pki.crl(ca)}
        parts = forge.QuoteParts(chain=(pck, ca, world.pki.root), qe_key=pck.key)
        return world.evidence(parts=parts, collateral=held)

    return make


def _signer(**how: Any) -> Make:
    def make(world: World) -> Evidence:
        one = forge.issue("Intel SGX TCB Signing", world.pki.root, ca=False, **how)
        text, signature = forge.signed(one.key, forge.tcb_info())
        chain = one.pem + world.pki.root.pem
        held = {"tcb_info_issuer_chain": chain, "tcb_info": text, "tcb_info_signature": signature}
        return world.evidence(collateral=held)

    return make


def _other_collateral(world: World) -> Evidence:
    return world.evidence(collateral=forge.collateral(forge.Hierarchy.make()))


# Revocation lists


def _crls() -> Iterator[Case]:
    day = timedelta(days=1)

    def crl(name: str, of: str, *revoked: str, **how: Any) -> Make:
        def make(world: World) -> Evidence:
            pki = world.pki
            listed = [getattr(pki, one) for one in revoked]
            return world.evidence(collateral={name: pki.crl(getattr(pki, of), *listed, **how)})

        return make

    yield Case("CRLs", "PCK revoked", "refused pck_chain", crl("pck_crl", "ca", "pck"))
    yield Case("CRLs", "PCK CA revoked", "unavailable signer", crl("root_ca_crl", "root", "ca"))
    yield Case("CRLs", "TCB signer revoked", "unavailable signer", crl("root_ca_crl", "root", "signer"))
    for name, part, of in (("pck_crl", "pck_crl", "ca"), ("root_ca_crl", "root_crl", "root")):
        yield Case("CRLs", f"{part} expired", f"unavailable {part}", crl(name, of, ends=forge.NOW - day / 2))
        yield Case(
            "CRLs", f"{part} not valid yet", f"unavailable {part}", crl(name, of, begins=forge.NOW + day)
        )
        yield Case(
            "CRLs",
            f"{part} signed by another",
            f"unavailable {part}",
            crl(name, of, signed_by=forge.new_key()),
        )
    yield Case(
        "CRLs", "the root's CRL in place of the PCK CA's", "unavailable pck_crl", crl("pck_crl", "root")
    )


# TCB info


def _tcb() -> Iterator[Case]:
    def info(**fields: Any) -> Make:
        return lambda world: world.evidence(info=forge.tcb_info() | fields)

    def levels(*found: dict[str, Any]) -> Make:
        return info(tcbLevels=list(found))

    newer = forge.tcb_level("UpToDate", date="2026-05-01T00:00:00Z", svn=2)
    gone = forge.NOW - timedelta(hours=1)
    for status in (
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDateConfigurationNeeded",
    ):
        yield Case("TCB info", status, "refused tcb_status", levels(forge.tcb_level(status)))
    yield Case("TCB info", "out of date", "refused tcb_status", levels(newer, forge.tcb_level("OutOfDate")))
    yield Case("TCB info", "revoked level", "refused tcb_status", levels(forge.tcb_level("Revoked")))
    yield Case("TCB info", "no level fits", "refused tcb_status", levels(newer))
    yield Case(
        "TCB info",
        "an advisory applies",
        "refused advisories",
        levels(forge.tcb_level("UpToDate", advisories=("INTEL-SA-00000",))),
    )
    yield Case("TCB info", "a byte changed", "unavailable tcb_info", _edited("tcb_info"))
    yield Case("TCB info", "signed by another", "unavailable tcb_info", _resigned("tcb_info"))
    yield Case("TCB info", "expired", "unavailable tcb_info", info(nextUpdate=forge.when(gone)))
    yield Case(
        "TCB info",
        "issued in the future",
        "unavailable tcb_info",
        info(issueDate=forge.when(forge.NOW + timedelta(hours=1))),
    )
    yield Case("TCB info", "of another platform", "unavailable platform", info(fmspc="00" * 6))
    yield Case("TCB info", "of SGX", "unavailable platform", info(id="SGX"))
    yield td("TCB info", "a TD below every level", "tcb_status", tcb_svn=bytes([6, 1, 2] + [0] * 13))


def _edited(name: str) -> Make:
    def make(world: World) -> Evidence:
        held = forge.collateral(world.pki)
        return world.evidence(collateral=held | {name: held[name].replace("UpToDate", "UpToDatf")})

    return make


def _resigned(name: str) -> Make:
    def make(world: World) -> Evidence:
        held = forge.collateral(world.pki)
        other = forge.signature(forge.new_key(), held[name].encode()).hex()
        return world.evidence(collateral=held | {f"{name}_signature": other})

    return make


# QE identity


def _identity() -> Iterator[Case]:
    def identity(**fields: Any) -> Make:
        return lambda world: world.evidence(identity=forge.qe_identity() | fields)

    level = forge.qe_identity()["tcbLevels"][0]
    gone = forge.NOW - timedelta(hours=1)
    yield Case("QE identity", "a byte changed", "unavailable qe_identity", _edited("qe_identity"))
    yield Case("QE identity", "signed by another", "unavailable qe_identity", _resigned("qe_identity"))
    yield Case("QE identity", "expired", "unavailable qe_identity", identity(nextUpdate=forge.when(gone)))
    yield Case("QE identity", "names another signer", "refused qe_identity", identity(mrsigner="00" * 32))
    yield Case("QE identity", "names another product", "refused qe_identity", identity(isvprodid=1))
    yield Case("QE identity", "of the SGX QE", "unavailable qe_identity", identity(id="QE"))
    for status in ("OutOfDate", "Revoked"):
        found = identity(tcbLevels=[level | {"tcbStatus": status}])
        yield Case("QE identity", f"level {status}", "refused tcb_status", found)


# TDX module


def _module() -> Iterator[Case]:
    def module(**fields: Any) -> Make:
        def make(world: World) -> Evidence:
            info = forge.tcb_info()
            info["tdxModuleIdentities"][0] |= fields
            return world.evidence(info=info)

        return make

    level = forge.tcb_info()["tdxModuleIdentities"][0]["tcbLevels"][0]
    yield td("TDX module", "of a version that Intel does not name", "seam_module", tcb_svn=_svn(6, 9))
    yield td("TDX module", "too old", "seam_module", tcb_svn=_svn(5, 1))
    yield td("TDX module", "of another signer", "seam_module", signer_seam=b"s" * 48)
    yield td("TDX module", "with other attributes", "seam_module", seam_attributes=b"\x01" + bytes(7))
    for status in ("OutOfDate", "Revoked"):
        yield Case(
            "TDX module",
            f"level {status}",
            "refused tcb_status",
            module(tcbLevels=[level | {"tcbStatus": status}]),
        )
    yield Case("TDX module", "not signed by Intel, though named", "refused seam_signer", _signed_module)


def _svn(low: int, version: int) -> bytes:
    return bytes([low, version, 3] + [0] * 13)


def _signed_module(world: World) -> Evidence:
    info = forge.tcb_info()
    info["tdxModuleIdentities"][0]["mrsigner"] = "73" * 48
    return world.evidence(info=info, td={"signer_seam": b"s" * 48})
