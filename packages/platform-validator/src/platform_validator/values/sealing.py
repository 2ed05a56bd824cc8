"""Seals values at rest: AES-SIV (RFC 5297) under one active key; older ones open what is not resealed yet.

AES-SIV stays safe where a nonce would repeat, and takes its context as a list: a value is bound to its
challenge, key and version, a reply to its session and request, so that none passes for another. Whoever can
write the database can still bring back an older copy of the whole of it.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from platform_validator.store.records import SealedText, ValueRecord, ValueReply
from platform_validator.values.errors import ValueUnreadable

KEY_BYTES = 32
_NONCE = 16
_LABEL = b"platform-values-v1"


@dataclass(frozen=True, slots=True)
class ValueKey:
    """A key (32 random bytes) and its id (16 hex digits, derived from it)."""

    secret: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """What is stored beside what it sealed."""
        return _derived(self.secret, b"id", 8).hex()


class ValuesSeal:
    """Opens under every key that it was given, seals under the last one.

    `accepts_clear` holds only while what an older version kept in clear is sealed for the first time: later,
    a row in clear was put there by somebody else.
    """

    def __init__(self, *keys: ValueKey) -> None:
        self._ciphers: Mapping[str, AESSIV] = {}
        self.active = ""
        self.accepts_clear = False
        self.use(*keys)

    def use(self, *keys: ValueKey) -> None:
        """From now on these keys, oldest first."""
        self._ciphers = {key.id: AESSIV(_derived(key.secret, b"cipher", 64)) for key in keys}
        self.active = keys[-1].id

    def seal_value(self, challenge_id: str, key: str, version: int, clear: bytes) -> SealedText:
        """A value, bound to its place."""
        return self._seal(clear, _value_context(challenge_id, key, version))

    def open_value(self, record: ValueRecord) -> bytes:
        """A value in clear.

        Raises:
            ValueUnreadable: It does not open.
        """
        context = _value_context(record.challenge_id, record.key, record.version)
        return self._open(SealedText(record.value, record.key_id), context)

    def seal_reply(self, session_id: str, request_id: str, clear: bytes) -> SealedText:
        """What a request was answered."""
        return self._seal(clear, _reply_context(session_id, request_id))

    def open_reply(self, session_id: str, request_id: str, reply: SealedText) -> bytes:
        """The answer in clear.

        Raises:
            ValueUnreadable: It does not open.
        """
        return self._open(reply, _reply_context(session_id, request_id))

    def reseal_value(self, record: ValueRecord) -> SealedText:
        """The same value under the active key. Raises ValueUnreadable."""
        return self.seal_value(record.challenge_id, record.key, record.version, self.open_value(record))

    def reseal_reply(self, reply: ValueReply) -> SealedText:
        """The same answer under the active key. Raises ValueUnreadable."""
        text = SealedText(reply.reply, reply.key_id)
        clear = self.open_reply(reply.session_id, reply.request_id, text)
        return self.seal_reply(reply.session_id, reply.request_id, clear)

    def _seal(self, clear: bytes, context: list[bytes]) -> SealedText:
        nonce = secrets.token_bytes(_NONCE)
        sealed = self._ciphers[self.active].encrypt(clear, [*context, nonce])
        return SealedText(base64.b64encode(nonce + sealed).decode(), self.active)

    def _open(self, stored: SealedText, context: list[bytes]) -> bytes:
        if stored.key_id is None:
            if not self.accepts_clear:
                raise ValueUnreadable("it is in clear, which ours never is: restore it from a backup")
            return stored.text.encode()
        cipher = self._ciphers.get(stored.key_id)
        if cipher is None:
            raise ValueUnreadable(f"sealed under the key {stored.key_id}, which is not here: restore it")
        try:
            raw = base64.b64decode(stored.text, validate=True)
            return cipher.decrypt(raw[_NONCE:], [*context, raw[:_NONCE]])
        except (InvalidTag, binascii.Error, ValueError) as error:
            raise ValueUnreadable("it does not open: changed, or moved from elsewhere") from error


def _value_context(challenge_id: str, key: str, version: int) -> list[bytes]:
    return [_LABEL, b"value", challenge_id.encode(), key.encode(), str(version).encode()]


def _reply_context(session_id: str, request_id: str) -> list[bytes]:
    return [_LABEL, b"reply", session_id.encode(), request_id.encode()]


def _derived(secret: bytes, use: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, salt=None, info=_LABEL + b" " + use).derive(secret)
