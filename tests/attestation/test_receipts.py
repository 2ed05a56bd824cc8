"""Receipts: an honest one is proved, others are refuted by name; what is missing is said."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.dsse import Envelope
from tests.attestation import forge
from tests.attestation.evidence import DATA, World
from tests.attestation.tampered_receipts import (
    KEYPAIR,
    ReceiptCase,
    _for,
    facts,
    given,
    receipts,
    record,
    result,
    told,
)
from typer.testing import CliRunner

from platform_protocol.canonical import canonical_json, sha256_hex
from platform_protocol.receipts import PAYLOAD_TYPE, ReceiptInvalid, _HotkeySigner, open_receipt, seal_receipt
from platform_validator.attestation.os_image import ImagesFile, KnownImages, Published
from platform_validator.attestation.receipt_check import Verdict, check_receipt, summary
from platform_validator.cli.main import app

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "verify_receipt.py"


@pytest.fixture(scope="module")
def world() -> World:
    """One hierarchy for all."""
    return World()


def test_an_honest_receipt_is_proved_in_everything(world: World) -> None:
    """Against its validator, challenge, root and collateral."""
    found = check_receipt(seal_receipt(KEYPAIR, facts(world)), given(world))
    assert {one.name: one.verdict for one in found} == dict.fromkeys(
        (
            "signature",
            "subject",
            "record",
            "submission",
            "compose",
            "challenge",
            "binding",
            "chain",
            "event_log",
            "policy",
            "os_image",
        ),
        Verdict.PROVED,
    )
    assert "SIMULATED" in next(one.detail for one in found if one.name == "chain")


@pytest.mark.parametrize("case", receipts(), ids=str)
def test_a_receipt_that_lies_or_was_changed_is_refuted_by_name(case: ReceiptCase, world: World) -> None:
    """Also where other checks fail with it."""
    assert case.check in case.refuted(world)


def test_a_platform_that_fell_behind_is_the_reader_s_to_accept(world: World) -> None:
    """Its signatures hold; the validator's policy may have accepted it, and the line says what."""
    info = forge.tcb_info()
    info["tcbLevels"][0]["tcbStatus"] = "OutOfDate"
    behind = json.dumps(forge.collateral(world.pki, info=info))
    found = {
        one.name: one
        for one in check_receipt(seal_receipt(KEYPAIR, facts(world)), given(world, collateral=behind))
    }
    assert found["chain"].verdict is Verdict.PROVED
    assert found["policy"].verdict is Verdict.NOT_CHECKABLE
    assert found["policy"].detail.startswith("accept it or not: tcb_status: ")


def test_a_job_without_a_submission_says_so(world: World) -> None:
    text = record(world, submission_sha256=None)
    none = facts(world, submission_sha256=None, **_for(world, text))
    found = {
        one.name: one for one in check_receipt(seal_receipt(KEYPAIR, none), given(world, submission=None))
    }
    assert (found["submission"].verdict, found["record"].verdict) == (Verdict.PROVED, Verdict.PROVED)


def test_what_is_not_given_is_not_checkable(world: World) -> None:
    """And not taken for proved."""
    bare = given(
        world, validator=None, compose=None, collateral=None, root=None, images=None, submission=None
    )
    found = check_receipt(seal_receipt(KEYPAIR, facts(world)), bare)
    left = {one.name for one in found if one.verdict is Verdict.NOT_CHECKABLE}
    assert left == {"challenge", "chain", "os_image", "policy", "submission"}
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
        "policy",
        "os_image",
    }
    assert not [one for one in found if one.verdict is Verdict.REFUTED]
    assert absent in next(one.detail for one in found if one.name == "record")


@pytest.mark.parametrize(
    ("trust", "says"),
    [
        ("pinned_first_use", "TRUSTED IT ON FIRST USE, 2026-01-01T00:00:00Z (first use (measured))"),
        ("pinned", "by an entry of its own (first use (measured))"),
        ("published", "as published"),
        ("unknown", "DID NOT KNOW IT"),
        ("not_checked", "did not check it"),
    ],
)
def test_how_the_image_came_to_be_trusted_is_told_and_not_taken_for_proved(
    world: World, trust: str, says: str
) -> None:
    """It is the validator's word, until the reader has images that he trusts himself."""
    envelope = seal_receipt(KEYPAIR, facts(world, os_image=told(trust=trust)))
    line = next(one for one in check_receipt(envelope, given(world, images=None)) if one.name == "os_image")
    assert line.verdict is Verdict.NOT_CHECKABLE
    assert says in line.detail
    assert "--images FILE" in line.detail
    line = next(one for one in check_receipt(envelope, given(world)) if one.name == "os_image")
    assert line.verdict is Verdict.PROVED
    assert "known here: tests" in line.detail
    assert says in line.detail


def test_the_second_program_tells_and_checks_the_image_too(world: World, tmp_path: Path) -> None:
    """`examples/verify_receipt.py` over a receipt of a generated quote: by two entries."""
    known, other = world.images().pinned[0], replace(world.images().pinned[0], rtmr2="00" * 48)
    (tmp_path / "receipt.json").write_text(json.dumps(seal_receipt(KEYPAIR, facts(world))))
    (tmp_path / "root.pem").write_text(world.pki.root.pem)
    (tmp_path / "collateral.json").write_text(given(world).collateral or "")
    ends = {}
    for name, entry in (("known", known), ("other", other)):
        ImagesFile(tmp_path / name).add(entry)
        done = subprocess.run(
            [
                sys.executable,
                str(PROGRAM),
                *(str(tmp_path / one) for one in ("receipt.json", "root.pem", "collateral.json", name)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "pinned_first_use 2026-01-01T00:00:00Z first use (measured)" in done.stdout
        ends[name] = "the image is one of those" in done.stdout, "REFUTED: the image" in done.stderr
    assert ends == {"known": (True, False), "other": (False, True)}


def test_a_published_image_is_proved_by_the_document_that_the_receipt_carries(world: World) -> None:
    """A real machine's quote, log and vm_config; under another publisher's hash it is refuted."""
    lite = json.loads((DATA / "dstack_lite_quote.json").read_text())
    image_hash = json.loads(lite["vm_config"])["os_image_hash"]
    said = told(trust="published", memory_mb=2048, vm_config=lite["vm_config"])
    shown = facts(
        world,
        quote=base64.b64encode(bytes.fromhex(lite["quote"])).decode(),
        event_log=lite["event_log"],
        os_image=said,
    )
    verdicts = {}
    for name, digest in (("its", image_hash), ("another", "0" * 64)):
        images = KnownImages((), (Published(said["image"], digest, "its publisher"),))
        found = check_receipt(seal_receipt(KEYPAIR, shown), given(world, images=images))
        verdicts[name] = next(one.verdict for one in found if one.name == "os_image")
    assert verdicts == {"its": Verdict.PROVED, "another": Verdict.REFUTED}


def test_a_receipt_from_before_they_named_the_image_is_read_and_says_so(world: World) -> None:
    """Signed without the key, as earlier versions did: everything else is proved as ever."""
    envelope = seal_receipt(KEYPAIR, facts(world))
    statement = json.loads(base64.b64decode(envelope["payload"]))
    del statement["predicate"]["os_image"]
    older = Envelope(canonical_json(statement), PAYLOAD_TYPE, {})
    older.sign(_HotkeySigner(KEYPAIR))
    found = check_receipt(older.to_dict(), given(world))
    assert {one.name for one in found if one.verdict is not Verdict.PROVED} == {"os_image"}
    assert found[-1].verdict is Verdict.NOT_CHECKABLE
    assert "does not say which image" in found[-1].detail


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
    assert checks["os_image"] == "not_checkable"
    images = ImagesFile(tmp_path / "images.toml")
    assert run(str(path), "--images", str(images.path))[0] == 2
    images.add(world.images().pinned[0])
    code, shown = run(str(path), "--images", str(images.path))
    assert "proved        os_image" in shown
    images.path.write_text("[[pinned]]")
    assert run(str(path), "--images", str(images.path))[0] == 2
    path.write_text("no JSON")
    assert run(str(path))[0] == 2
    assert run(str(tmp_path / "nothing"))[0] == 2
