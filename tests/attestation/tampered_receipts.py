"""Receipts that were changed after they were signed, or lied before; each refuted by its check."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.attestation import forge
from tests.attestation.evidence import COMPOSE, IMAGE, SHAPE, World

from platform_protocol.canonical import canonical_json
from platform_protocol.evidence import result_record, result_report_data
from platform_protocol.ids import ChallengeId, Hotkey, JobId
from platform_protocol.receipts import ReceiptFacts, logs_digest, seal_receipt
from platform_protocol.signing import Keypair
from platform_validator.attestation.os_image import ImageTrust, KnownImages, Trust
from platform_validator.attestation.receipt_check import Given, Verdict, check_receipt

KEYPAIR = Keypair.from_seed(b"r" * 32)
OTHER = Keypair.from_seed(b"o" * 32)
SUBMISSION = "ab" * 32


def record(world: World, **changed: Any) -> str:
    """R of an honest run, but for what is given."""
    given: dict[str, Any] = {
        "job_id": JobId("job"),
        "attempt": 1,
        "validator": KEYPAIR.address,
        "challenge_id": ChallengeId("challenge"),
        "submission_sha256": SUBMISSION,
        "payload_sha256": "cd" * 32,
        "result": {"score": 0.5, "metrics": {"accuracy": 0.5}},
    }
    del world
    return result_record(**(given | changed)).decode()


def result(world: World, **changed: Any) -> str:
    """The result body that a receipt is about."""
    body = {
        "attempt": 1,
        "outcome": "succeeded",
        "score": 0.5,
        "metrics": {"accuracy": 0.5, "final_score": 0.5},
        "execution_time_ms": 10,
        "error": None,
        "github_commit": "a" * 40,
        "compose_hash": world.compose_hash,
        "isolation_level": "Tee",
        "attestation": "simulated",
    }
    return canonical_json(body | changed).decode()


def evidence(world: World, text: str, **td: Any) -> tuple[str, str]:
    """A quote that binds a record, and its event log."""
    made = world.evidence(td={"report_data": result_report_data(text.encode()), **td})
    return base64.b64encode(made.quote or b"").decode(), made.event_log


def told(**changed: Any) -> dict[str, Any]:
    """How the OS image came to be trusted, as the receipt says."""
    first = "2026-01-01T00:00:00Z"
    trust = ImageTrust(Trust.FIRST_USE, IMAGE, SHAPE, "first use (measured)", first)
    return {**json.loads(trust.told()), **changed}


def facts(world: World, **changed: Any) -> ReceiptFacts:
    """What an honest receipt says, but for what is given."""
    text = record(world)
    quote, event_log = evidence(world, text)
    honest = ReceiptFacts(
        result=result(world),
        logs_sha256=logs_digest([]),
        record=text,
        quote=quote,
        event_log=event_log,
        absent=None,
        app_compose=COMPOSE.decode(),
        github_commit="a" * 40,
        submission_sha256=SUBMISSION,
        isolation_level="Tee",
        attestation="simulated",
        session=2,
        claimed_at="2026-01-01T00:00:00Z",
        sealed_at="2026-01-01T00:01:00Z",
        os_image=told(),
    )
    return replace(honest, **changed)


def given(world: World, **changed: Any) -> Given:
    """Everything that a receipt can be checked against."""
    held = Given(
        now=forge.NOW,
        validator=KEYPAIR.address,
        compose=COMPOSE,
        collateral=json.dumps(forge.collateral(world.pki)),
        root=world.pki.root.der,
        images=world.images(),
        submission=SUBMISSION,
    )
    return replace(held, **changed)


@dataclass(frozen=True, slots=True)
class ReceiptCase:
    """One kind: its name, the check that must refute it, and the envelope and what it is checked against."""

    name: str
    check: str
    make: Callable[[World], tuple[dict[str, Any], Given]]

    def __str__(self) -> str:
        return f"receipt: {self.name}"

    def refuted(self, world: World) -> list[str]:
        """The checks that refute it."""
        found = check_receipt(*self.make(world))
        return [one.name for one in found if one.verdict is Verdict.REFUTED]


def _said(name: str, check: str, change: Callable[[World], dict[str, Any]]) -> ReceiptCase:
    """Signed by its validator, and not true."""
    return ReceiptCase(
        name, check, lambda world: (seal_receipt(KEYPAIR, facts(world, **change(world))), given(world))
    )


def _sent(name: str, change: Callable[[dict[str, Any]], None]) -> ReceiptCase:
    """Changed after it was signed."""

    def make(world: World) -> tuple[dict[str, Any], Given]:
        envelope = seal_receipt(KEYPAIR, facts(world))
        change(envelope)
        return envelope, given(world)

    return ReceiptCase(name, "signature", make)


def _held(name: str, check: str, **against: Callable[[World], Any]) -> ReceiptCase:
    """Honest, and checked against what it is not of."""

    def make(world: World) -> tuple[dict[str, Any], Given]:
        return seal_receipt(KEYPAIR, facts(world)), given(
            world, **{key: value(world) for key, value in against.items()}
        )

    return ReceiptCase(name, check, make)


def _flip(field: str) -> Callable[[dict[str, Any]], None]:
    def change(envelope: dict[str, Any]) -> None:
        where = envelope if field == "payload" else envelope["signatures"][0]
        raw = bytearray(base64.b64decode(where[field]))
        raw[len(raw) // 2] ^= 1
        where[field] = base64.b64encode(bytes(raw)).decode()

    return change


def _for(world: World, text: str, **td: Any) -> dict[str, Any]:
    quote, event_log = evidence(world, text, **td)
    return {"record": text, "quote": quote, "event_log": event_log}


def _log(world: World, change: Callable[[list[dict[str, Any]]], None]) -> dict[str, Any]:
    events = world.events()
    change(events)
    return {"event_log": json.dumps(events)}


def _with_another_app_id(world: World) -> dict[str, Any]:
    events, text = world.events(), record(world)
    for event in events:
        if event["event"] == "app-id":
            event["event_payload"] = "ab" * 20
    made = world.evidence(events=events, td={"report_data": result_report_data(text.encode())})
    return {"quote": base64.b64encode(made.quote or b"").decode(), "event_log": made.event_log}


def receipts() -> list[ReceiptCase]:
    """Every kind."""
    return [
        _sent("a flipped bit of the payload", _flip("payload")),
        _sent("a flipped bit of the signature", _flip("sig")),
        _sent("another payload type", lambda sent: sent.update(payloadType="text/plain")),
        _sent("another signer's name", lambda sent: sent["signatures"][0].update(keyid=OTHER.address)),
        _sent("no signature", lambda sent: sent.update(signatures=[])),
        _sent("two signatures", lambda sent: sent["signatures"].append(sent["signatures"][0])),
        _sent("a signer that is no address", lambda sent: sent["signatures"][0].update(keyid="5")),
        _sent("no payload", lambda sent: sent.pop("payload")),
        _held("another validator's", "signature", validator=lambda _: Hotkey(OTHER.address)),
        _held("another challenge's", "challenge", compose=lambda _: COMPOSE + b" "),
        _held("another root", "chain", root=lambda _: World().pki.root.der),
        _held(
            "another platform's collateral",
            "chain",
            collateral=lambda _: json.dumps(forge.collateral(World().pki)),
        ),
        _said(
            "a better score than the record's", "record", lambda world: {"result": result(world, score=0.9)}
        ),
        _said("another attempt's result", "record", lambda world: {"result": result(world, attempt=2)}),
        _said(
            "success for a failure",
            "record",
            lambda world: _for(world, record(world, result=None, error={"code": "x", "message": "y"})),
        ),
        _said(
            "failure for a success",
            "record",
            lambda world: {"result": result(world, outcome="failed", score=0.0)},
        ),
        _said(
            "another validator's record",
            "record",
            lambda world: _for(world, record(world, validator=OTHER.address)),
        ),
        _said(
            "another submission's record",
            "record",
            lambda world: _for(world, record(world, submission_sha256="ee" * 32)),
        ),
        _said("another submission", "record", lambda _: {"submission_sha256": "ee" * 32}),
        _said("another commit", "record", lambda _: {"github_commit": "b" * 40}),
        _said(
            "a higher isolation level",
            "record",
            lambda world: {"result": result(world, isolation_level="Vm")},
        ),
        _said("another attestation", "record", lambda world: {"result": result(world, attestation="tdx")}),
        _said("a record that is none", "record", lambda world: _for(world, "[]")),
        _said("another app-compose", "compose", lambda _: {"app_compose": COMPOSE.decode() + " "}),
        _said(
            "another compose hash", "compose", lambda world: {"result": result(world, compose_hash="0" * 64)}
        ),
        _said(
            "a record that the quote does not bind",
            "binding",
            lambda world: {"record": record(world, payload_sha256="0" * 64)},
        ),
        _said(
            "a quote of a handshake",
            "binding",
            lambda world: {"quote": base64.b64encode(world.evidence().quote or b"").decode()},
        ),
        _said("a quote that is none", "binding", lambda _: {"quote": base64.b64encode(b"no quote").decode()}),
        _said("no quote, without a reason", "binding", lambda _: {"quote": None}),
        _said(
            "simulated passed off as Intel's",
            "chain",
            lambda world: {"attestation": "tdx", "result": result(world, attestation="tdx")},
        ),
        _said(
            "an event log with another compose hash",
            "event_log",
            lambda world: _log(world, lambda events: events[5].update(event_payload="0" * 64)),
        ),
        _said(
            "an event log without its first event",
            "event_log",
            lambda world: _log(world, lambda events: events.__delitem__(0)),
        ),
        _said(
            "an event log out of order",
            "event_log",
            lambda world: _log(world, lambda events: events.insert(3, events.pop())),
        ),
        _said("no event log", "event_log", lambda _: {"event_log": ""}),
        _held("another submission", "submission", submission=lambda _: "ee" * 32),
        _said(
            "a TD whose memory can be read",
            "chain",
            lambda world: _for(world, record(world), attributes=bytes.fromhex("0100001000000000")),
        ),
        _said("another app's id in the measured log", "policy", _with_another_app_id),
        _said("another image", "os_image", lambda _: {"os_image": told(image="another")}),
        _said("another shape", "os_image", lambda _: {"os_image": told(memory_mb=4096)}),
        _said("a kind of trust that is none", "os_image", lambda _: {"os_image": told(trust="vouched")}),
        _said(
            "an image without its shape",
            "os_image",
            lambda _: {"os_image": {"trust": "pinned", "image": IMAGE}},
        ),
        _said(
            "another image's registers",
            "os_image",
            lambda world: _for(world, record(world), mrtd=b"m" * 48),
        ),
        _held("images that know no such one", "os_image", images=lambda _: KnownImages()),
        _said(
            "registers of another boot",
            "event_log",
            lambda world: _for(world, record(world), rtmrs=(bytes(48),) * 4),
        ),
    ]
