"""Receipts: an honest one is proved, others are refuted by name; what is missing is said."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tests.attestation.evidence import World
from tests.attestation.tampered_receipts import KEYPAIR, ReceiptCase, facts, given, receipts, result
from typer.testing import CliRunner

from platform_protocol.canonical import sha256_hex
from platform_protocol.receipts import ReceiptInvalid, open_receipt, seal_receipt
from platform_validator.attestation.receipt_check import Verdict, check_receipt, summary
from platform_validator.cli.main import app


@pytest.fixture(scope="module")
def world() -> World:
    """One hierarchy for all."""
    return World()


def test_an_honest_receipt_is_proved_in_everything(world: World) -> None:
    """Against its validator, challenge, root and collateral."""
    found = check_receipt(seal_receipt(KEYPAIR, facts(world)), given(world))
    assert {one.name: one.verdict for one in found} == dict.fromkeys(
        ("signature", "subject", "record", "compose", "challenge", "binding", "chain", "event_log"),
        Verdict.PROVED,
    )
    assert "SIMULATED" in next(one.detail for one in found if one.name == "chain")


@pytest.mark.parametrize("case", receipts(), ids=str)
def test_a_receipt_that_lies_or_was_changed_is_refuted_by_name(case: ReceiptCase, world: World) -> None:
    """Also where other checks fail with it."""
    assert case.check in case.refuted(world)


def test_what_is_not_given_is_not_checkable(world: World) -> None:
    """And not taken for proved."""
    bare = given(world, validator=None, compose=None, collateral=None, root=None)
    found = check_receipt(seal_receipt(KEYPAIR, facts(world)), bare)
    left = {one.name for one in found if one.verdict is Verdict.NOT_CHECKABLE}
    assert left == {"challenge", "chain"}
    assert summary(found) is Verdict.NOT_CHECKABLE


@pytest.mark.parametrize("absent", ["session_version_1", "no_result", "large_result", "no_quote"])
def test_a_receipt_without_evidence_says_why_and_proves_less(world: World, absent: str) -> None:
    """Below Tee, from version 1 of the session, of a timeout: honest, and not checkable."""
    without = facts(
        world,
        record=None,
        quote=None,
        event_log="",
        absent=absent,
        attestation="none",
        result=result(world, attestation="none"),
    )
    found = check_receipt(seal_receipt(KEYPAIR, without), given(world))
    assert {one.name for one in found if one.verdict is Verdict.NOT_CHECKABLE} == {
        "record",
        "binding",
        "chain",
        "event_log",
    }
    assert not [one for one in found if one.verdict is Verdict.REFUTED]
    assert absent in next(one.detail for one in found if one.name == "record")


def test_a_receipt_is_a_dsse_envelope_over_an_in_toto_statement(world: World) -> None:
    """Field by field, as others read it; opening it changes nothing of it."""
    envelope = seal_receipt(KEYPAIR, facts(world))
    before = json.dumps(envelope)
    assert open_receipt(envelope).signer == KEYPAIR.address
    assert json.dumps(envelope) == before
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    statement: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "urn:platform-validator:receipt:v1"
    digest = sha256_hex(result(world).encode())
    assert statement["subject"] == [{"name": "result", "digest": {"sha256": digest}}]
    assert statement["predicate"]["session"] == 2


@pytest.mark.parametrize(
    "envelope", [{}, {"payload": 1}, {"payload": "", "payloadType": "x", "signatures": [{}]}]
)
def test_what_is_no_envelope_is_invalid(envelope: dict[str, Any]) -> None:
    """Whatever it is instead."""
    with pytest.raises(ReceiptInvalid) as refused:
        open_receipt(envelope)
    assert refused.value.check == "envelope"


def test_a_signed_statement_of_another_kind_is_no_receipt(world: World) -> None:
    """A session number that is none, and a field that is missing."""
    with pytest.raises(ReceiptInvalid) as refused:
        open_receipt(seal_receipt(KEYPAIR, facts(world, session=3)))
    assert refused.value.check == "statement"
    with pytest.raises(ReceiptInvalid):
        open_receipt(seal_receipt(KEYPAIR, facts(world, app_compose=None)))


def test_the_command_s_exit_codes(world: World, tmp_path: Path) -> None:
    """0 proved is for who has everything; 1 refuted, 3 not checkable, 2 no receipt at all."""

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["verify", *words])
        return done.exit_code, done.output

    path = tmp_path / "receipt.json"
    path.write_text(json.dumps({"receipt": seal_receipt(KEYPAIR, facts(world))}))
    code, shown = run(str(path), "--validator", KEYPAIR.address)
    assert code == 3
    assert "proved        signature" in shown
    assert "give the challenge's tree" in shown
    assert run(str(path), "--validator", "5Other")[0] == 1
    held = tmp_path / "collateral.json"
    held.write_text(json.dumps({"asked_at": "", "collateral": json.loads(given(world).collateral or "")}))
    root = tmp_path / "root.pem"
    root.write_text(world.pki.root.pem)
    code, shown = run(
        str(path),
        "--collateral",
        str(held),
        "--simulated-root",
        str(root),
        "--at",
        given(world).now.isoformat(),
        "--json",
    )
    checks = {one["check"]: one["verdict"] for one in json.loads(shown)["checks"]}
    assert code == 3
    assert checks["chain"] == "proved"
    path.write_text("no JSON")
    assert run(str(path))[0] == 2
    assert run(str(tmp_path / "nothing"))[0] == 2
