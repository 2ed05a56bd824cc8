"""Version 1 of the session, as deployed challenges speak it. Only by policy: it binds no key to the quote."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from platform_protocol.session.errors import FrameInvalid

VERSION = 1
AEAD = "chacha20poly1305"
_INFO = b"platform-api-sdk-v1"
_NOT_A_QUOTE = b"NOT A QUOTE platform-validator"
_NOT_A_QUOTE_BYTES = 1024
_REPORT_DATA_OFFSET = 568
MAX_MESSAGE = 64 * 1024 * 1024
"""Bytes of one message."""
MAX_ENVELOPE = 4 * ((MAX_MESSAGE + 16 + 2) // 3) + 256
"""Characters of a frame that holds one: base64 of it and its tag, and what is around it, however spaced."""


class EnvelopeChannel:
    """JSON envelopes under one key for both directions, with random nonces and no associated data."""

    def __init__(self, key: bytes, random: Callable[[int], bytes]) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._random = random

    def seal(self, plaintext: bytes) -> str:
        """A text frame."""
        nonce = self._random(12)
        envelope = {
            "enc": AEAD,
            "nonce": _b64(nonce),
            "ciphertext": _b64(self._cipher.encrypt(nonce, plaintext, None)),
        }
        return json.dumps(envelope, separators=(",", ":"))

    def open(self, frame: str) -> bytes | None:
        """The plaintext; None for a frame that is no envelope, which version 1 peers ignore.

        Raises:
            FrameInvalid: An envelope that does not open.
        """
        envelope = _envelope(frame)
        if envelope is None:
            return None
        try:
            nonce = base64.b64decode(envelope["nonce"], validate=True)
            ciphertext = base64.b64decode(envelope["ciphertext"], validate=True)
            return self._cipher.decrypt(nonce, ciphertext, None)
        except (InvalidTag, binascii.Error, ValueError, TypeError) as error:
            raise FrameInvalid("a version 1 envelope does not open") from error


def begin_fields(nonce: bytes) -> dict[str, Any]:
    """What version 1 wants in the first frame beside nonce and key. It says itself that it is no quote."""
    stand_in = bytearray(_NOT_A_QUOTE.ljust(_NOT_A_QUOTE_BYTES, b"\x00"))
    stand_in[_REPORT_DATA_OFFSET : _REPORT_DATA_OFFSET + 32] = hashlib.sha256(nonce).digest()
    return {"val_quote": _b64(bytes(stand_in)), "val_event_log": "[]", "val_rtmrs": []}


def report_data(nonce: bytes) -> bytes:
    """What the challenge's quote binds: SHA-256 of the raw nonce, zero-padded to 64 bytes."""
    return hashlib.sha256(nonce).digest().ljust(64, b"\x00")


def accept_frame(salt: bytes) -> str:
    """`attestation_ok` with the key derivation's salt (32 bytes)."""
    return json.dumps(
        {"type": "attestation_ok", "aead": AEAD, "hkdf_salt": _b64(salt)}, separators=(",", ":")
    )


def derive_key(shared: bytes, salt: bytes) -> bytes:
    """The session's key, 32 bytes."""
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=_INFO).derive(shared)


def _envelope(frame: str) -> dict[str, Any] | None:
    if len(frame) > MAX_ENVELOPE:
        return None
    try:
        value = json.loads(frame)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("enc") != AEAD:
        return None
    return value if {"nonce", "ciphertext"} <= value.keys() else None


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
