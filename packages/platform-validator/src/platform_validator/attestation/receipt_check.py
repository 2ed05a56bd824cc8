"""What a receipt proves, offline: each thing by name, proved, refuted, or not checkable with what is given.

| check | proved when |
|---|---|
| `signature` | the hotkey that it names signed it, and it is the expected one where one was given |
| `subject` | the signed digest is that of the result that it shows |
| `record` | what the CVM recorded is of this validator and submission, and gives this result's score |
| `submission` | the submission that the record names is the given one |
| `compose` | the app-compose that it shows has the compose hash of the result |
| `challenge` | that app-compose is what the given tree of the challenge makes |
| `binding` | the quote binds the record, and no other |
| `chain` | the quote's signatures verify under Intel's root, or under the simulated one that was given |
| `event_log` | the event log replays to the quote's registers, and measured this app-compose |
| `policy` | the CVM meets the strictest policy of attestation: TCB, no debug mode, key provider and so on |
| `os_image` | MRTD and RTMR0 to 2 of the quote are those of the given images; the receipt's word is told |
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from platform_protocol.canonical import sha256_hex
from platform_protocol.evidence import result_report_data
from platform_protocol.ids import Hotkey
from platform_protocol.receipts import Receipt, ReceiptInvalid, open_receipt
from platform_validator.attestation.checks import ADJUSTABLE, Check, Outcome, Outcomes
from platform_validator.attestation.event_log import EventLogRefused, check_event_log
from platform_validator.attestation.os_image import ImageTrust, KnownImages, Shape, Trust, check_os_image
from platform_validator.attestation.policy import AttestationRules, Expected, find_faults
from platform_validator.attestation.quote import (
    QuoteBody,
    QuoteInvalid,
    VerifiedQuote,
    parse_quote,
    verify_quote,
)


class Verdict(StrEnum):
    """What came of one check."""

    PROVED = "proved"
    REFUTED = "refuted"
    NOT_CHECKABLE = "not_checkable"


@dataclass(frozen=True, slots=True)
class ReceiptCheck:
    """One thing, and why."""

    name: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, slots=True)
class Given:
    """What the receipt is checked against; what is None makes its check `not_checkable`.

    `compose`: the app-compose bytes that the challenge's tree makes. `collateral`: dcap-qvl's JSON, judged at
    `now`. `root`: the simulated root (DER) that is trusted here; None: Intel's alone. `images`: the OS images
    that are trusted here. `submission`: SHA-256 (hex) of the one that is at hand.
    """

    now: datetime
    validator: Hotkey | None = None
    compose: bytes | None = None
    collateral: str | None = None
    root: bytes | None = None
    images: KnownImages | None = None
    submission: str | None = None


def check_receipt(envelope: Mapping[str, Any], given: Given) -> list[ReceiptCheck]:
    """Every check, in the table's order; a receipt that does not open is refuted by its first check alone."""
    try:
        receipt = open_receipt(envelope)
    except ReceiptInvalid as error:
        return [ReceiptCheck("signature", Verdict.REFUTED, f"{error.check}: {error}")]
    quote = _quote(receipt)
    chain, verified = _chain(receipt, quote, given)
    return [
        _signature(receipt, given),
        _subject(receipt),
        _record(receipt),
        _submission(receipt, given),
        _compose(receipt),
        _challenge(receipt, given),
        _binding(receipt, quote),
        chain,
        _event_log(receipt, quote),
        _policy(receipt, quote, verified, given),
        _os_image(receipt, quote, given),
    ]


def summary(checks: list[ReceiptCheck]) -> Verdict:
    """Refuted if anything is; else not checkable if anything is; else proved."""
    found = {one.verdict for one in checks}
    for verdict in (Verdict.REFUTED, Verdict.NOT_CHECKABLE):
        if verdict in found:
            return verdict
    return Verdict.PROVED


def _judge(name: str, holds: bool, good: str, bad: str) -> ReceiptCheck:
    return ReceiptCheck(name, Verdict.PROVED if holds else Verdict.REFUTED, good if holds else bad)


def _signature(receipt: Receipt, given: Given) -> ReceiptCheck:
    expected = given.validator or receipt.signer
    return _judge(
        "signature",
        receipt.signer == expected,
        f"signed by {receipt.signer}",
        f"signed by {receipt.signer}, expected {expected}",
    )


def _subject(receipt: Receipt) -> ReceiptCheck:
    digest = sha256_hex(receipt.facts.result.encode())
    shown = f"{receipt.subject[:16]}…"
    return _judge(
        "subject", digest == receipt.subject, f"the result {shown}", f"it names {shown}, shows {digest[:16]}…"
    )


def _result(receipt: Receipt) -> dict[str, Any]:
    try:
        found = json.loads(receipt.facts.result)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _record(receipt: Receipt) -> ReceiptCheck:
    facts, result = receipt.facts, _result(receipt)
    if facts.record is None:
        return ReceiptCheck("record", Verdict.NOT_CHECKABLE, f"the CVM left no record: {facts.absent}")
    try:
        record = json.loads(facts.record)
        said = record.get("result")
        score = 0.0 if "error" in record else float(said["score"])
        same = {
            "validator": record["validator"] == receipt.signer,
            "attempt": record["attempt"] == result.get("attempt"),
            "submission": record["submission_sha256"] == facts.submission_sha256,
            "score": score == result.get("score"),
            "outcome": ("error" in record) == (result.get("outcome") in {"failed", "timeout"}),
            "commit": result.get("github_commit") == facts.github_commit,
            "attestation": result.get("attestation") == facts.attestation,
            "isolation level": result.get("isolation_level") == facts.isolation_level,
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return ReceiptCheck("record", Verdict.REFUTED, f"the record cannot be read: {error!r}")
    wrong = [name for name, holds in same.items() if not holds]
    good = (
        f"job {record['job_id']} attempt {record['attempt']}: {result.get('outcome')} {result.get('score')}"
    )
    return _judge("record", not wrong, good, f"record and result differ in: {', '.join(wrong)}")


def _submission(receipt: Receipt, given: Given) -> ReceiptCheck:
    named = receipt.facts.submission_sha256
    if named is None:
        return ReceiptCheck("submission", Verdict.PROVED, "the job had none")
    if given.submission is None:
        detail = f"{named[:16]}…; give it: --submission FILE"
        return ReceiptCheck("submission", Verdict.NOT_CHECKABLE, detail)
    return _judge(
        "submission",
        named == given.submission,
        f"the given one, {named[:16]}…",
        f"it names {named[:16]}…, the given one is {given.submission[:16]}…",
    )


def _compose(receipt: Receipt) -> ReceiptCheck:
    digest, named = sha256_hex(receipt.facts.app_compose.encode()), str(_result(receipt).get("compose_hash"))
    return _judge(
        "compose",
        digest == named,
        f"app-compose {digest[:16]}…",
        f"it has {digest[:16]}…, the result {named[:16]}…",
    )


def _challenge(receipt: Receipt, given: Given) -> ReceiptCheck:
    if given.compose is None:
        return ReceiptCheck(
            "challenge", Verdict.NOT_CHECKABLE, "give the challenge's tree at its commit: --tree DIR"
        )
    same = given.compose == receipt.facts.app_compose.encode()
    return _judge(
        "challenge",
        same,
        f"made by the tree, commit {receipt.facts.github_commit}",
        "the tree makes another app-compose",
    )


def _quote(receipt: Receipt) -> tuple[bytes, QuoteBody] | str:
    facts = receipt.facts
    if facts.quote is None:
        return f"there is no quote: {facts.absent or 'attestation ' + facts.attestation}"
    try:
        raw = base64.b64decode(facts.quote, validate=True)
        return raw, parse_quote(raw)
    except (binascii.Error, ValueError, QuoteInvalid) as error:
        return f"not a quote: {error}"


def _absent(name: str, receipt: Receipt, why: str) -> ReceiptCheck:
    """Without a quote nothing is proved; where attestation was claimed, that is refuted."""
    claimed = receipt.facts.attestation != "none" and receipt.facts.absent is None
    return ReceiptCheck(name, Verdict.REFUTED if claimed else Verdict.NOT_CHECKABLE, why)


def _binding(receipt: Receipt, quote: tuple[bytes, QuoteBody] | str) -> ReceiptCheck:
    if isinstance(quote, str):
        return _absent("binding", receipt, quote)
    if receipt.facts.record is None:
        return ReceiptCheck("binding", Verdict.NOT_CHECKABLE, f"there is no record: {receipt.facts.absent}")
    same = quote[1].report_data == result_report_data(receipt.facts.record.encode())
    return _judge("binding", same, "the quote binds this record", "the quote binds something else")


def _chain(
    receipt: Receipt, quote: tuple[bytes, QuoteBody] | str, given: Given
) -> tuple[ReceiptCheck, VerifiedQuote | None]:
    """With the quote, where its chain verifies."""
    simulated = receipt.facts.attestation == "simulated"
    if isinstance(quote, str):
        return _absent("chain", receipt, quote), None
    if simulated and given.root is None:
        why = "simulated: no hardware proves it; its root: --simulated-root PEM"
        return ReceiptCheck("chain", Verdict.NOT_CHECKABLE, why), None
    if given.collateral is None:
        why = "give the platform's collateral: --collateral FILE"
        return ReceiptCheck("chain", Verdict.NOT_CHECKABLE, why), None
    try:
        verified = verify_quote(quote[0], given.collateral, given.now, given.root if simulated else None)
    except QuoteInvalid as error:
        return ReceiptCheck("chain", Verdict.REFUTED, str(error)), None
    what = "SIMULATED: signed by the root that was given, proves nothing of hardware"
    what = what if simulated else "Intel TDX"
    return ReceiptCheck("chain", Verdict.PROVED, f"{what}; TCB {verified.status}"), verified


def _policy(
    receipt: Receipt, quote: tuple[bytes, QuoteBody] | str, verified: VerifiedQuote | None, given: Given
) -> ReceiptCheck:
    """What the validator's policy asks of a quote at its strictest, but for what has a line of its own."""
    if isinstance(quote, str):
        return _absent("policy", receipt, quote)
    if verified is None:
        return ReceiptCheck("policy", Verdict.NOT_CHECKABLE, "the quote's chain is not proved")
    expected = Expected(sha256_hex(receipt.facts.app_compose.encode()), verified.body.report_data)
    rules = AttestationRules(Outcomes({Check.OS_IMAGE: Outcome.OFF}))
    faults = find_faults(verified, receipt.facts.event_log, expected, rules, now=given.now).faults
    told = "; ".join(f"{check.value}: {detail}" for check, detail in faults)
    if any(check not in ADJUSTABLE for check, _ in faults):
        return ReceiptCheck("policy", Verdict.REFUTED, told)
    if faults:
        # A policy may accept these: whether the reader's does is for him to say.
        return ReceiptCheck("policy", Verdict.NOT_CHECKABLE, f"accept it or not: {told}")
    return ReceiptCheck("policy", Verdict.PROVED, "the strictest, but for the OS image")


def _event_log(receipt: Receipt, quote: tuple[bytes, QuoteBody] | str) -> ReceiptCheck:
    if isinstance(quote, str):
        return _absent("event_log", receipt, quote)
    try:
        identity = check_event_log(receipt.facts.event_log, quote[1].rtmrs)
    except EventLogRefused as error:
        return ReceiptCheck("event_log", Verdict.REFUTED, f"{error.check}: {error}")
    measured = sha256_hex(receipt.facts.app_compose.encode())
    same = identity.compose_hash == measured
    return _judge(
        "event_log",
        same,
        f"measured {measured[:16]}…",
        f"it measured {identity.compose_hash[:16]}…, not {measured[:16]}…",
    )


_TRUSTED = {
    Trust.PINNED: "the validator trusted it by an entry of its own ({origin})",
    Trust.FIRST_USE: "the validator TRUSTED IT ON FIRST USE, {first_use} ({origin})",
    Trust.PUBLISHED: "the validator trusted it as published ({origin})",
    Trust.UNKNOWN: "the validator DID NOT KNOW IT, and its policy only warns",
    Trust.NOT_CHECKED: "the validator did not check it",
}


def _os_image(receipt: Receipt, quote: tuple[bytes, QuoteBody] | str, given: Given) -> ReceiptCheck:
    said = receipt.facts.os_image
    if isinstance(quote, str):
        return _absent("os_image", receipt, quote)
    if said is None:
        return ReceiptCheck("os_image", Verdict.NOT_CHECKABLE, "the receipt does not say which image it was")
    try:
        image, vm_config = str(said["image"]), str(said.get("vm_config", ""))
        shape = Shape(int(said["cpu"]), int(said["memory_mb"]), int(said["gpus"]))
        told = f"{image} at {shape}: {_TRUSTED[Trust(said['trust'])].format(**said)}"
        identity = check_event_log(receipt.facts.event_log, quote[1].rtmrs)
    except (KeyError, TypeError, ValueError, OverflowError, EventLogRefused) as error:
        return ReceiptCheck("os_image", Verdict.REFUTED, f"what it says of the image is nothing: {error!r}")
    if given.images is None:
        detail = f"{told}; give the images that you trust: --images FILE"
        return ReceiptCheck("os_image", Verdict.NOT_CHECKABLE, detail)
    found = check_os_image(given.images, quote[1], identity, image=image, shape=shape, vm_config=vm_config)
    wrong = found if isinstance(found, str) else ""
    known = f"known here: {found.origin}" if isinstance(found, ImageTrust) else ""
    return _judge("os_image", not wrong, f"{told}; {known}", f"{told}; {wrong}")
