"""What a CVM shows and what it is judged by, in one value; and the judgement, by the product's own policy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote as percent

from tests.attestation import forge

from platform_protocol.compose import compose_hash
from platform_protocol.event_log import parse_event_log, replay
from platform_protocol.ids import Hotkey, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.session.v2 import report_data
from platform_validator.attestation.collateral import CollateralInvalid, CollateralUnavailable
from platform_validator.attestation.collateral_cache import CollateralCache
from platform_validator.attestation.errors import AttestationRefused, AttestationUnavailable
from platform_validator.attestation.mr_config import BoundApp
from platform_validator.attestation.os_image import KnownImages, Pinned, Shape
from platform_validator.attestation.policy import AttestationPolicy, AttestationRules, Expected
from platform_validator.attestation.quote import QuoteChecker
from platform_validator.attestation.tcb import TcbRules
from platform_validator.clock import SystemClock

DATA = Path(__file__).resolve().parents[2] / "packages/platform-validator/tests/data/tdx"
ACCEPTED = "accepted"
IMAGE, SHAPE = "dstack-0.6.0", Shape(2, 2048)
COMPOSE = b'{"manifest_version":2,"name":"digits","runner":"docker-compose"}'
INSTANCE = "5b" * 20
NONCE, VALIDATOR_KEY, GUEST_KEY = b"n" * 32, b"v" * 32, b"g" * 32
VALIDATOR = Hotkey("5DDexample")
VM = VmName("pv-0123456789-1")


class At(SystemClock):
    """A wall clock that stands still."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def now(self) -> datetime:
        return self.moment


def served(collateral: dict[str, str]) -> Any:
    """A collateral service that gives this, with the paths and headers of Intel's."""

    async def fetch(path: str) -> tuple[bytes, dict[str, str]]:
        if "pckcrl" in path:
            return bytes.fromhex(collateral["pck_crl"]), {
                "SGX-PCK-CRL-Issuer-Chain": percent(collateral["pck_crl_issuer_chain"])
            }
        if "rootcacrl" in path:
            return collateral["root_ca_crl"].encode(), {}
        if "/tcb?" in path:
            body = f'{{"tcbInfo":{collateral["tcb_info"]},"signature":"{collateral["tcb_info_signature"]}"}}'
            return body.encode(), {"TCB-Info-Issuer-Chain": percent(collateral["tcb_info_issuer_chain"])}
        body = (
            f'{{"enclaveIdentity":{collateral["qe_identity"]},'
            f'"signature":"{collateral["qe_identity_signature"]}"}}'
        )
        return body.encode(), {
            "SGX-Enclave-Identity-Issuer-Chain": percent(collateral["qe_identity_issuer_chain"])
        }

    return fetch


@dataclass(frozen=True, slots=True)
class Evidence:
    """A quote with everything beside it. `root` None: Intel's."""

    quote: bytes | None
    event_log: str
    collateral: dict[str, str]
    expected: Expected
    images: KnownImages
    root: bytes | None
    now: datetime
    tcb: TcbRules = field(default_factory=TcbRules)


async def judged(evidence: Evidence) -> str:
    """`accepted`, `refused CHECK`, or `unavailable PART` where the collateral cannot be used."""
    clock = At(evidence.now)
    cache = CollateralCache(fetch=served(evidence.collateral), clock=clock, root=evidence.root)
    policy = AttestationPolicy(
        level=IsolationLevel.TEE,
        allow_simulated=False,
        checker=QuoteChecker(collateral=cache, clock=clock, root=evidence.root),
        rules=AttestationRules(images=lambda: evidence.images, tcb=evidence.tcb),
        clock=clock,
    )
    try:
        await policy.judge(evidence.quote, evidence.event_log, evidence.expected)
    except AttestationRefused as error:
        return f"refused {error.check}"
    except AttestationUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, CollateralInvalid):
            return f"unavailable {cause.part}"
        return "unavailable service" if isinstance(cause, CollateralUnavailable) else "unavailable quote"
    return ACCEPTED


# A real machine's


def real_dstack() -> Evidence:
    """The whole chain of checks over a real dstack CVM; its image counts as pinned as it was measured."""
    report = json.loads((DATA / "dstack_quote_report.json").read_text())
    raw = bytes.fromhex(report["quote"])
    text = (DATA / "dstack_collateral.json").read_text()
    events = parse_event_log(report["event_log"])
    app = next(event.event_payload for event in events if event.event == "compose-hash")
    shape = Shape(16, 65536, 1)
    rtmr0, rtmr1, rtmr2 = (raw[at : at + 48].hex() for at in (376, 424, 472))
    pinned = Pinned("dstack-nvidia", shape, raw[184:232].hex(), rtmr0, rtmr1, rtmr2, "the vector")
    return Evidence(
        quote=raw,
        event_log=report["event_log"],
        collateral=json.loads(text),
        expected=Expected(
            app,
            bytes.fromhex(report["report_data"]).ljust(64, b"\x00"),
            image="dstack-nvidia",
            shape=shape,
            vm_config=report["vm_config"],
            key_provider="local-sgx",
        ),
        images=KnownImages((pinned,)),
        root=None,
        now=datetime(2026, 3, 1, tzinfo=UTC),
    )


# Generated ones


class World:
    """A private hierarchy, and an honest CVM under it: what each tampering begins with."""

    def __init__(self) -> None:
        self.pki = forge.Hierarchy.make()
        self.compose_hash = compose_hash(COMPOSE)
        self.app = BoundApp(self.compose_hash, self.compose_hash[:40], INSTANCE, "none", "")
        self.report_data = report_data(NONCE, VALIDATOR_KEY, GUEST_KEY, VALIDATOR, VM)

    def events(self) -> list[dict[str, Any]]:
        """The event log of an honest boot."""
        return honest_events(self.compose_hash, INSTANCE)

    def images(self) -> KnownImages:
        """What the honest boot measures, pinned."""
        td = self.td(self.events())
        rtmr0, rtmr1, rtmr2, _ = (one.hex() for one in td.rtmrs)
        return KnownImages((Pinned(IMAGE, SHAPE, td.mrtd.hex(), rtmr0, rtmr1, rtmr2, "tests"),))

    def td(self, events: list[dict[str, Any]]) -> forge.Td:
        """A TD that measured those events, and binds this world's handshake."""
        return replace(measured(events), report_data=self.report_data)

    def evidence(
        self,
        *,
        events: list[dict[str, Any]] | None = None,
        shown: list[dict[str, Any]] | None = None,
        td: dict[str, Any] | None = None,
        parts: forge.QuoteParts | None = None,
        info: dict[str, Any] | None = None,
        identity: dict[str, Any] | None = None,
        collateral: dict[str, str] | None = None,
        vm_config: str = "{}",
        tcb: TcbRules | None = None,
    ) -> Evidence:
        """An honest CVM's, but for what is given.

        Args:
            events: What it measured.
            shown: The log that it shows instead.
            td: Other fields of its report: they are signed like the rest.
            parts: Another way to sign.
            info: Another TCB info.
            identity: Another QE identity.
            collateral: Fields of the collateral that are replaced.
            vm_config: What the guest says of its configuration.
            tcb: What is accepted.
        """
        measured = events or self.events()
        report = replace(self.td(measured), **(td or {}))
        held = forge.collateral(self.pki, info=info, identity=identity) | (collateral or {})
        return Evidence(
            quote=forge.quote(self.pki, report, parts),
            event_log=json.dumps(measured if shown is None else shown),
            collateral=held,
            expected=Expected(self.compose_hash, self.report_data, IMAGE, SHAPE, vm_config),
            images=self.images(),
            root=self.pki.root.der,
            now=forge.NOW,
            tcb=tcb or TcbRules(),
        )


def runtime(name: str, payload: str) -> dict[str, Any]:
    """A runtime event as agents show it from v0.5.6 on: its digest is left to whoever verifies."""
    return {"imr": 3, "event_type": 0x08000001, "digest": "", "event": name, "event_payload": payload}


def honest_events(compose_hash: str, instance: str) -> list[dict[str, Any]]:
    """The event log of an honest boot of an app."""
    boot = [
        {
            "imr": imr,
            "event_type": 0x80000003,
            "digest": hashlib.sha384(name.encode()).hexdigest(),
            "event": name,
            "event_payload": "",
        }
        for imr, name in enumerate(("firmware", "kernel", "initrd"))
    ]
    provider = json.dumps({"name": "none", "id": ""}).encode().hex()
    return boot + [
        runtime(name, payload)
        for name, payload in (
            ("system-preparing", ""),
            ("app-id", compose_hash[:40]),
            ("compose-hash", compose_hash),
            ("instance-id", instance),
            ("boot-mr-done", ""),
            ("key-provider", provider),
            ("storage-fs", b"zfs".hex()),
            ("system-ready", ""),
        )
    ]


def measured(events: list[dict[str, Any]]) -> forge.Td:
    """A TD that measured those events."""
    parsed = parse_event_log(json.dumps(events))
    return forge.Td(rtmrs=(replay(parsed, 0), replay(parsed, 1), replay(parsed, 2), replay(parsed, 3)))
