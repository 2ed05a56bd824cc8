"""Verify a receipt without the validator's code: DSSE, in-toto, sr25519, and the quote where there is one.

    python examples/verify_receipt.py RECEIPT.json [SIMULATED_ROOT.pem COLLATERAL.json [IMAGES.toml]]

Needs py-sr25519-bindings, base58, rfc8785, cryptography and dcap-qvl, and nothing of this project. Prints a
line for each thing that holds; ends with 1 at the first that does not.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import base58
import dcap_qvl
import rfc8785
import sr25519
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

PAYLOAD_TYPE = "application/vnd.in-toto+json"
RUNTIME_EVENT = 0x08000001


def require(holds: bool, what: str) -> None:
    """Say that it holds, or end."""
    if not holds:
        sys.exit(f"REFUTED: {what}")
    print(f"holds: {what}")


def sha256(data: bytes) -> str:
    """In hex."""
    return hashlib.sha256(data).hexdigest()


def public_key(address: str) -> bytes:
    """The key of an SS58 address of prefix 42 (one byte of prefix, 32 of key, 2 of checksum)."""
    raw = base58.b58decode(address)
    checksum = hashlib.blake2b(b"SS58PRE" + raw[:-2]).digest()[:2]
    require(len(raw) == 35 and raw[0] == 42 and raw[-2:] == checksum, f"{address} is an address")
    return raw[1:-2]


def opened(envelope: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Who signed, and the in-toto statement (DSSE v1: pre-authentication encoding)."""
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    encoding = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    [signature] = envelope["signatures"]
    signer = signature["keyid"]
    valid = sr25519.verify(base64.b64decode(signature["sig"]), encoding, public_key(signer))
    require(envelope["payloadType"] == PAYLOAD_TYPE and valid, f"signed by {signer}")
    return signer, json.loads(payload)


def check_statement(signer: str, statement: dict[str, Any]) -> dict[str, Any]:
    """Subject, result and record agree; returns the predicate."""
    require(statement["_type"] == "https://in-toto.io/Statement/v1", "an in-toto statement")
    require(statement["predicateType"] == "urn:platform-validator:receipt:v1", "of a receipt")
    predicate: dict[str, Any] = statement["predicate"]
    [subject] = statement["subject"]
    require(subject["digest"]["sha256"] == sha256(predicate["result"].encode()), "the subject is the result")
    result = json.loads(predicate["result"])
    require(rfc8785.dumps(result).decode() == predicate["result"], "the result is in its RFC 8785 form")
    compose = predicate["app_compose"].encode()
    require(sha256(compose) == result["compose_hash"], "the app-compose has the result's compose hash")
    if predicate["record"] is not None:
        record = json.loads(predicate["record"])
        score = 0.0 if "error" in record else record["result"]["score"]
        require(record["validator"] == signer, "the record is of this validator")
        require(record["submission_sha256"] == predicate["submission_sha256"], "and of this submission")
        require(score == result["score"], f"the record's score is the result's: {score}")
    print(f"result: {result['outcome']} {result['score']}, attestation {result['attestation']}")
    return predicate


def replayed(events: list[dict[str, Any]], register: int) -> bytes:
    """One RTMR from its events; those of the running system are hashed anew from name and payload."""
    value = bytes(48)
    for event in events:
        if event["imr"] != register:
            continue
        digest = bytes.fromhex(event.get("digest") or "")
        if event["event_type"] == RUNTIME_EVENT:
            named = event["event_type"].to_bytes(4, "little") + b":" + event["event"].encode() + b":"
            image = named + bytes.fromhex(event["event_payload"])
            if event.get("version", 1) == 2:
                told = {"name": event["event"], "payload": event["event_payload"], "type": RUNTIME_EVENT}
                image = rfc8785.dumps(told)
            digest = hashlib.sha384(image).digest()
        value = hashlib.sha384(value + digest.ljust(48, b"\0")).digest()
    return value


def check_image(told: dict[str, Any], report: Any) -> None:
    """What the validator says of the OS image, and the registers against pinned images that were given."""
    print("os image:", *(told.get(key) for key in ("image", "trust", "first_use", "origin")))
    if len(sys.argv) <= 4:
        print("not checked: the OS image (give the images that you trust)")
        return
    named = {"mrtd": report.mr_td, "rtmr0": report.rt_mr0, "rtmr1": report.rt_mr1, "rtmr2": report.rt_mr2}
    wanted: dict[str, Any] = {name: bytes(value).hex() for name, value in named.items()}
    wanted |= {key: told.get(key) for key in ("image", "cpu", "memory_mb", "gpus")}
    pinned = tomllib.loads(Path(sys.argv[4]).read_text())["pinned"]
    require(any(wanted.items() <= one.items() for one in pinned), "the image is one of those that were given")


def check_evidence(predicate: dict[str, Any], root: bytes | None, collateral: str | None) -> None:
    """The quote binds the record; the event log replays, and measured the app-compose; then the chain."""
    report = dcap_qvl.parse_quote(raw := base64.b64decode(predicate["quote"])).report
    digest = hashlib.sha256(predicate["record"].encode()).digest()
    bound = hashlib.sha512(b"platform-result-v1\0" + digest).digest()
    require(bytes(report.report_data) == bound, "the quote binds the record")
    events = json.loads(predicate["event_log"])
    for number, register in enumerate((report.rt_mr0, report.rt_mr1, report.rt_mr2, report.rt_mr3)):
        require(replayed(events, number) == bytes(register), f"the event log replays to RTMR{number}")
    measured = [event["event_payload"] for event in events if event["event"] == "compose-hash"]
    require(measured == [sha256(predicate["app_compose"].encode())], "the CVM measured this app-compose")
    check_image(predicate.get("os_image") or {"image": "not said"}, report)
    if collateral is None:
        print("not checked: the quote's signatures (give root and collateral)")
        return
    parsed = dcap_qvl.QuoteCollateralV3.from_json(collateral)
    verified = dcap_qvl.verify_with_root_ca(raw, parsed, root, int(time.time()))
    require(verified.status == "UpToDate", "the quote's signatures hold under the root that was given")


def main() -> None:
    """See the module."""
    predicate = check_statement(*opened(json.loads(Path(sys.argv[1]).read_text())))
    if predicate["quote"] is None:
        print(f"no quote: {predicate['absent']}")
        return
    root = collateral = None
    if len(sys.argv) > 3:
        certificate = x509.load_pem_x509_certificate(Path(sys.argv[2]).read_bytes())
        root = certificate.public_bytes(Encoding.DER)
        kept = json.loads(Path(sys.argv[3]).read_text())
        collateral = json.dumps(kept.get("collateral", kept))
    check_evidence(predicate, root, collateral)


if __name__ == "__main__":
    main()
