"""SS58 addresses of 32-byte public keys (Substrate's address format; checksum BLAKE2b-512 over `SS58PRE`)."""

from __future__ import annotations

from hashlib import blake2b

import base58

from platform_protocol.errors import ProtocolError

_KEY_BYTES = 32
_CHECKSUM_BYTES = 2


class BadAddress(ProtocolError):
    """Not an SS58 address of a 32-byte key with the expected prefix."""


def encode(public_key: bytes, prefix: int = 42) -> str:
    """The address of a public key (32 bytes).

    Raises:
        BadAddress: The key has another length, or the prefix is not 0 to 63.
    """
    if len(public_key) != _KEY_BYTES or not 0 <= prefix < 64:  # noqa: PLR2004 - one-byte prefixes end at 63
        raise BadAddress(
            f"expected a 32-byte key and a prefix of 0 to 63, got {len(public_key)} bytes, {prefix}"
        )
    body = bytes([prefix]) + public_key
    return base58.b58encode(body + _checksum(body)).decode("ascii")


def decode(address: str, prefix: int = 42) -> bytes:
    """The public key (32 bytes) of an address.

    Raises:
        BadAddress: Not base58, wrong length, wrong checksum, or another prefix.
    """
    try:
        raw = base58.b58decode(address)
    except ValueError as error:
        raise BadAddress(f"expected an SS58 address, got {address[:64]!r}: not base58") from error
    if len(raw) != 1 + _KEY_BYTES + _CHECKSUM_BYTES:
        raise BadAddress(f"expected an SS58 address of 35 bytes, {address[:64]!r} has {len(raw)}")
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if _checksum(body) != checksum:
        raise BadAddress(f"the checksum of {address!r} is wrong: a character was mistyped or lost")
    if body[0] != prefix:
        raise BadAddress(f"expected an address with prefix {prefix}, {address!r} has {body[0]}")
    return body[1:]


def _checksum(body: bytes) -> bytes:
    return blake2b(b"SS58PRE" + body).digest()[:_CHECKSUM_BYTES]
