"""The handshake of a version 2 session, and which version a peer speaks.

V dials and proves that it knows the VM's launch secret; S answers with a key that its quote binds; V
accepts or rejects. Keys are fresh for every connection, a resume included.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
from collections.abc import Callable, MutableSet
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from platform_protocol.ids import Hotkey, VmName
from platform_protocol.session import v1
from platform_protocol.session.channel import LABEL, SealedChannel, derive_keys
from platform_protocol.session.errors import AttestationRejected, AuthRefused, HandshakeInvalid

VERSION = 2
_BEGIN_LABEL = b"platform-session-v2 begin"
_KEY_BYTES = 32
MAX_BEGIN = 64 * 1024
"""Characters of a handshake frame of V: what S reads of whoever dials."""
MAX_RESPONSE = 2 * 1024 * 1024
"""Characters of S's answer, which has a quote and an event log."""

Random = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Offer:
    """What S answered, to be judged before `accept`. `report_data` (64 bytes) is what its quote must bind.

    `vm` is the name that S claims, checked against ours; None in version 1.
    """

    version: int
    quote: bytes | None
    event_log: str
    vm_config: str
    report_data: bytes
    vm: VmName | None


@dataclass(frozen=True, slots=True)
class Begin:
    """An authenticated dial. `report_data` (64 bytes) is what S's quote must bind."""

    session_id: str
    resume: bool
    validator: Hotkey
    report_data: bytes


class ValidatorHandshake:
    """V's side of one connection: `begin`, `receive`, then `accept` or `reject`."""

    def __init__(
        self,
        *,
        launch_secret: bytes,
        vm: VmName,
        validator: Hotkey,
        session_id: str,
        resume: bool,
        allow_v1: bool = False,
        random: Random = os.urandom,
    ) -> None:
        self._secret = launch_secret
        self._vm = vm
        self._validator = validator
        self._session_id = session_id
        self._resume = resume
        self._allow_v1 = allow_v1
        self._random = random
        self._nonce = random(32)
        self._key = X25519PrivateKey.from_private_bytes(random(32))
        self._frame_1 = ""
        self._frame_2 = ""
        self._peer = b""
        self._version = 0

    def begin(self) -> str:
        """The first frame."""
        public = self._key.public_key().public_bytes_raw()
        frame: dict[str, Any] = {
            "type": "attestation_begin",
            "versions": [2, 1] if self._allow_v1 else [2],
            "nonce": self._nonce.hex(),
            "val_x25519_pub": _b64(public),
            "validator": self._validator,
            "session_id": self._session_id,
            "resume": self._resume,
            "auth": _auth(self._secret, self._nonce, public, self._validator, self._session_id),
        }
        if self._allow_v1:
            frame |= v1.begin_fields(self._nonce)
        self._frame_1 = json.dumps(frame, separators=(",", ":"))
        return self._frame_1

    def receive(self, frame: str) -> Offer:
        """S's answer.

        Raises:
            AttestationRejected: S refused (version 1 peers may).
            HandshakeInvalid: Not an answer; version 1 where it is not allowed; the name of another VM.
        """
        answer = _read(frame, MAX_RESPONSE)
        if answer.get("type") == "attestation_reject":
            raise AttestationRejected(f"the challenge rejected us: {str(answer.get('reason'))[:256]}")
        if answer.get("type") != "attestation_response":
            raise HandshakeInvalid(f"expected attestation_response, got {str(answer.get('type'))[:64]!r}")
        self._frame_2 = frame
        self._peer = _raw(answer, "chal_x25519_pub")
        if "version" not in answer:
            return self._receive_v1(answer)
        if answer["version"] != VERSION:
            raise HandshakeInvalid(f"expected session version 2, got {str(answer['version'])[:16]!r}")
        if answer.get("vm") != self._vm:
            raise HandshakeInvalid(f"expected VM {self._vm}, the peer says {str(answer.get('vm'))[:128]!r}")
        self._version = VERSION
        public = self._key.public_key().public_bytes_raw()
        return Offer(
            version=VERSION,
            quote=None if answer.get("quote") is None else _base64(answer, "quote"),
            event_log=_text(answer, "event_log"),
            vm_config=_text(answer, "vm_config"),
            report_data=report_data(self._nonce, public, self._peer, self._validator, self._vm),
            vm=self._vm,
        )

    def _receive_v1(self, answer: dict[str, Any]) -> Offer:
        if not self._allow_v1:
            raise HandshakeInvalid(
                "the challenge speaks session version 1, which allow_session_v1 does not allow"
            )
        self._version = v1.VERSION
        log = answer.get("event_log", "")
        return Offer(
            version=v1.VERSION,
            quote=_base64(answer, "quote") if answer.get("quote") else None,
            event_log=log if isinstance(log, str) else json.dumps(log),
            vm_config="",
            report_data=v1.report_data(self._nonce),
            vm=None,
        )

    def accept(self) -> tuple[str, SealedChannel | v1.EnvelopeChannel]:
        """The last frame, and the channel for everything after it.

        Raises:
            HandshakeInvalid: The peer's key is no X25519 key.
        """
        shared = _exchange(self._key, self._peer)
        if self._version == v1.VERSION:
            salt = self._random(32)
            return v1.accept_frame(salt), v1.EnvelopeChannel(v1.derive_key(shared, salt), self._random)
        to_guest, to_validator = derive_keys(
            frame_1=self._frame_1, frame_2=self._frame_2, shared=shared, launch_secret=self._secret
        )
        accepted = json.dumps({"type": "attestation_ok", "version": VERSION}, separators=(",", ":"))
        return accepted, SealedChannel(send_key=to_guest, receive_key=to_validator)

    @staticmethod
    def reject(reason: str) -> str:
        """The last frame, when policy refuses the offer."""
        return json.dumps({"type": "attestation_reject", "reason": reason}, separators=(",", ":"))


class ChallengeHandshake:
    """S's side of one connection: `receive_begin`, `respond`, `receive_verdict`."""

    def __init__(
        self,
        *,
        launch_secret: bytes,
        vm: VmName,
        seen_nonces: MutableSet[bytes],
        random: Random = os.urandom,
    ) -> None:
        self._secret = launch_secret
        self._vm = vm
        self._seen = seen_nonces
        self._key = X25519PrivateKey.from_private_bytes(random(32))
        self._frame_1 = ""
        self._frame_2 = ""
        self._peer = b""

    def receive_begin(self, frame: str) -> Begin:
        """V's first frame. A nonce that held is remembered, and never taken again.

        Raises:
            HandshakeInvalid: Not a begin of version 2.
            AuthRefused: The dialler does not know our launch secret, or repeats a nonce: close 4403.
        """
        begin = _read(frame, MAX_BEGIN)
        if begin.get("type") != "attestation_begin":
            raise HandshakeInvalid(f"expected attestation_begin, got {str(begin.get('type'))[:64]!r}")
        versions = begin.get("versions")
        if not isinstance(versions, list) or VERSION not in versions:
            raise HandshakeInvalid("expected a validator that speaks session version 2")
        nonce, public = _hex(begin, "nonce"), _raw(begin, "val_x25519_pub")
        validator, session_id = Hotkey(_text(begin, "validator")), _text(begin, "session_id")
        expected = _auth(self._secret, nonce, public, validator, session_id)
        if not hmac.compare_digest(expected.encode(), _text(begin, "auth").encode()):
            raise AuthRefused("the dialler does not know this VM's launch secret")
        if nonce in self._seen:
            raise AuthRefused("the nonce was used before")
        self._seen.add(nonce)
        self._frame_1, self._peer = frame, public
        ours = self._key.public_key().public_bytes_raw()
        return Begin(
            session_id=session_id,
            resume=begin.get("resume") is True,
            validator=validator,
            report_data=report_data(nonce, public, ours, validator, self._vm),
        )

    def respond(self, quote: bytes | None, event_log: str, vm_config: str) -> str:
        """The second frame. `quote` None: this VM can make none."""
        frame = {
            "type": "attestation_response",
            "version": VERSION,
            "chal_x25519_pub": _b64(self._key.public_key().public_bytes_raw()),
            "vm": self._vm,
            "quote": None if quote is None else _b64(quote),
            "event_log": event_log,
            "vm_config": vm_config,
        }
        self._frame_2 = json.dumps(frame, separators=(",", ":"))
        return self._frame_2

    def receive_verdict(self, frame: str) -> SealedChannel:
        """V's verdict, and the channel for everything after it.

        Raises:
            AttestationRejected: V refused.
            HandshakeInvalid: Not a verdict, or V's key is no X25519 key.
        """
        verdict = _read(frame, MAX_BEGIN)
        if verdict.get("type") == "attestation_reject":
            raise AttestationRejected(f"the validator rejected us: {str(verdict.get('reason'))[:256]}")
        if verdict.get("type") != "attestation_ok" or verdict.get("version") != VERSION:
            raise HandshakeInvalid("expected attestation_ok of version 2")
        to_guest, to_validator = derive_keys(
            frame_1=self._frame_1,
            frame_2=self._frame_2,
            shared=_exchange(self._key, self._peer),
            launch_secret=self._secret,
        )
        return SealedChannel(send_key=to_validator, receive_key=to_guest)


def report_data(nonce: bytes, val_pub: bytes, chal_pub: bytes, validator: Hotkey, vm: VmName) -> bytes:
    """What S's quote binds (64 bytes): nonce, both keys, the validator's address and the VM's name."""
    parts = LABEL, b"\x00", nonce, val_pub, chal_pub, _sha256(validator), _sha256(vm)
    return hashlib.sha512(b"".join(parts)).digest()


def _auth(secret: bytes, nonce: bytes, val_pub: bytes, validator: Hotkey, session_id: str) -> str:
    message = _BEGIN_LABEL + nonce + val_pub + _sha256(validator) + session_id.encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest()


def _exchange(key: X25519PrivateKey, peer: bytes) -> bytes:
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(peer))
    except ValueError as error:
        raise HandshakeInvalid("the peer's key is no X25519 key") from error


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _read(frame: str, most: int) -> dict[str, Any]:
    if len(frame) > most:
        raise HandshakeInvalid(f"expected a handshake frame of at most {most} characters")
    try:
        value = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise HandshakeInvalid("expected a JSON object") from error
    if not isinstance(value, dict):
        raise HandshakeInvalid("expected a JSON object")
    return value


def _text(frame: dict[str, Any], key: str) -> str:
    value = frame.get(key)
    if not isinstance(value, str):
        raise HandshakeInvalid(f"expected a string in {key!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise HandshakeInvalid(f"{key!r} has a lone surrogate") from error
    return value


def _base64(frame: dict[str, Any], key: str) -> bytes:
    try:
        return base64.b64decode(_text(frame, key), validate=True)
    except (binascii.Error, ValueError) as error:
        raise HandshakeInvalid(f"expected base64 in {key!r}") from error


def _raw(frame: dict[str, Any], key: str) -> bytes:
    value = _base64(frame, key)
    if len(value) != _KEY_BYTES:
        raise HandshakeInvalid(f"expected {_KEY_BYTES} bytes in {key!r}, got {len(value)}")
    return value


def _hex(frame: dict[str, Any], key: str) -> bytes:
    try:
        value = bytes.fromhex(_text(frame, key))
    except ValueError as error:
        raise HandshakeInvalid(f"expected hex in {key!r}") from error
    if len(value) != _KEY_BYTES:
        raise HandshakeInvalid(f"expected {_KEY_BYTES} bytes in {key!r}, got {len(value)}")
    return value
