"""Receipts: what a validator says of a result, signed with its hotkey, with the CVM's own evidence beside it.

A DSSE envelope (github.com/secure-systems-lab/dsse, version 1) over an in-toto Statement v1. Texts that were
hashed or signed are kept as texts, so that nobody has to write them down again byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf.json_format import MessageToDict, Parse, ParseError
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Key, Signature, Signer

from platform_protocol import ss58
from platform_protocol.canonical import canonical_json, sha256_hex
from platform_protocol.errors import ProtocolError
from platform_protocol.ids import Hotkey
from platform_protocol.signing import Keypair, verify

PREDICATE_TYPE = "urn:platform-validator:receipt:v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
KEY_TYPE = SCHEME = "sr25519"
NOT_SUBJECT = frozenset({"lease_token", "receipt", "logs"})
"""Keys of a result body that the subject leaves out: the token is secret, logs go in by their digest."""


class ReceiptInvalid(ProtocolError):
    """Not a receipt, or not signed by whom it names; `check` is `envelope`, `signature` or `statement`."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(detail)
        self.check = check


@dataclass(frozen=True, slots=True)
class ReceiptFacts:
    """What a receipt says.

    `result`: RFC 8785 text of the result body without `NOT_SUBJECT`; its SHA-256 is the subject. `record`: R
    (RFC 8785 text) of the CVM's evidence, None where there is none; `quote` (base64) and `event_log` are the
    evidence. `absent` says why there is no evidence. `session`: the version of the session that the result
    came over (protobuf's numbers: 1 or 2), None without a result. `os_image`: how the validator came to trust
    the OS image (`trust`, `image`, `cpu`, `memory_mb`, `gpus`, `origin`, `first_use`); None where no quote
    was asked for, and in receipts from before they said so.
    """

    result: str
    logs_sha256: str
    record: str | None
    quote: str | None
    event_log: str
    absent: str | None
    app_compose: str
    github_commit: str
    submission_sha256: str | None
    isolation_level: str
    attestation: str
    session: int | None
    claimed_at: str
    sealed_at: str
    os_image: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """An opened receipt: `signer` signed it; `subject` is the digest (hex) that it names."""

    signer: Hotkey
    subject: str
    facts: ReceiptFacts


def result_text(body: Mapping[str, Any]) -> str:
    """The RFC 8785 text of a result body that a receipt is about. Raises NotCanonical."""
    return canonical_json({key: value for key, value in body.items() if key not in NOT_SUBJECT}).decode()


def logs_digest(logs: list[str]) -> str:
    """SHA-256 (hex) of the RFC 8785 form of a result's logs."""
    return sha256_hex(canonical_json(logs))


def rfc3339(moment: datetime) -> str:
    """A receipt's times: UTC, to the second."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def seal_receipt(keypair: Keypair, facts: ReceiptFacts) -> dict[str, Any]:
    """The envelope, as it goes into a result body's `receipt`."""
    predicate = {name: getattr(facts, name) for name in ReceiptFacts.__dataclass_fields__}
    subject = ResourceDescriptor(name="result", digest={"sha256": sha256_hex(facts.result.encode())})
    statement = Statement([subject.pb], PREDICATE_TYPE, predicate)
    statement.validate()
    envelope = Envelope(canonical_json(MessageToDict(statement.pb)), PAYLOAD_TYPE, {})
    envelope.sign(_HotkeySigner(keypair))
    shown: dict[str, Any] = envelope.to_dict()
    return shown


def open_receipt(envelope: Mapping[str, Any]) -> Receipt:
    """Check the signature of the hotkey that signed, and read what it says.

    Raises:
        ReceiptInvalid: It is none, or the signature is not that hotkey's.
    """
    try:
        # A copy: reading changes the signatures in place.
        opened = Envelope.from_dict(json.loads(json.dumps(envelope)))
        [signature] = opened.signatures.values()
        signer = Hotkey(signature.keyid)
        key = HotkeyKey.of(signer)
    except Exception as error:  # whatever a parser of others raises on what it is given
        raise ReceiptInvalid("envelope", f"expected a DSSE envelope with one signature: {error!r}") from error
    try:
        opened.verify([key], threshold=1)
    except VerificationError as error:
        raise ReceiptInvalid("signature", f"the signature is not {signer}'s") from error
    return _read(signer, opened)


def _read(signer: Hotkey, envelope: Envelope) -> Receipt:
    if envelope.payload_type != PAYLOAD_TYPE:
        raise ReceiptInvalid("statement", f"expected {PAYLOAD_TYPE}, got {envelope.payload_type[:80]!r}")
    try:
        statement = Statement.copy_from_pb(Parse(envelope.payload, StatementMessage()))
        statement.validate()
        if statement.pb.predicate_type != PREDICATE_TYPE:
            raise ValueError(f"expected {PREDICATE_TYPE}, got {statement.pb.predicate_type[:80]!r}")
        [subject] = statement.pb.subject
        predicate = MessageToDict(statement.pb.predicate)
        predicate.setdefault("os_image", None)
        facts = ReceiptFacts(**{name: predicate[name] for name in ReceiptFacts.__dataclass_fields__})
        _check_types(facts)
        return Receipt(signer, str(subject.digest["sha256"]), facts)
    except (ParseError, ValueError, KeyError, TypeError) as error:
        raise ReceiptInvalid("statement", f"expected an in-toto statement of a receipt: {error}") from error


def _check_types(facts: ReceiptFacts) -> None:
    optional = {"record", "quote", "absent", "submission_sha256"}
    for name in ReceiptFacts.__dataclass_fields__:
        value = getattr(facts, name)
        if name == "session":
            if value not in (None, 1, 2):
                raise ValueError(f"session: expected 1, 2 or null, got {value!r}")
        elif name == "os_image":
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"os_image: expected an object or null, got {value!r}")
        elif not isinstance(value, str) and not (value is None and name in optional):
            raise ValueError(f"{name}: expected text, got {value!r}")


class HotkeyKey(Key):
    """A hotkey that verifies; its key id is its SS58 address."""

    @classmethod
    def of(cls, hotkey: Hotkey) -> HotkeyKey:
        """Raises BadAddress."""
        return cls(hotkey, KEY_TYPE, SCHEME, {"public": ss58.decode(hotkey).hex()})

    @classmethod
    def from_dict(cls, keyid: str, key_dict: dict[str, Any]) -> HotkeyKey:
        """From securesystemslib's form."""
        keytype, scheme, keyval = cls._from_dict(key_dict)
        return cls(keyid, keytype, scheme, keyval, key_dict)

    def to_dict(self) -> dict[str, Any]:
        """To securesystemslib's form."""
        return self._to_dict()

    def verify_signature(self, signature: Signature, data: bytes) -> None:
        """Raises UnverifiedSignatureError when it is not this hotkey's."""
        if not verify(self.keyid, data, bytes.fromhex(signature.signature)):
            raise UnverifiedSignatureError(f"not signed by {self.keyid}")


class _HotkeySigner(Signer):
    """A hotkey that signs."""

    def __init__(self, keypair: Keypair) -> None:
        self._keypair = keypair

    @property
    def public_key(self) -> Key:
        """Its public half."""
        return HotkeyKey.of(self._keypair.address)

    def sign(self, payload: bytes) -> Signature:
        """Sign."""
        return Signature(self._keypair.address, self._keypair.sign(payload).hex())

    @classmethod
    def from_priv_key_uri(
        cls,
        priv_key_uri: str,  # noqa: ARG003 - the library's signature
        public_key: Key,
        secrets_handler: Any = None,  # noqa: ARG003 - as above
    ) -> Signer:
        """A hotkey has no URI."""
        raise ValueError(f"a hotkey is not loaded from a URI: {public_key.keyid}")
