"""Requests to the Platform API, signed with a hotkey (sr25519, signing context `substrate`)."""

from __future__ import annotations

import hashlib
from typing import Literal, Self
from urllib.parse import urlsplit

import sr25519

from platform_protocol import ss58
from platform_protocol.errors import ProtocolError
from platform_protocol.ids import Hotkey

Role = Literal["validator", "miner"]
_LABEL = "platform-request-v1"
_SEED_BYTES = 32
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PLAIN_SCHEME = {"ws": "http", "wss": "https", "http": "http", "https": "https"}


class BadKey(ProtocolError):
    """Not a key that can sign."""


class BadUrl(ProtocolError):
    """Not an http(s) or ws(s) URL with a host."""


class Keypair:
    """An sr25519 key pair that can sign. Its repr shows the address only."""

    __slots__ = ("_secret", "address", "public_key")

    def __init__(self, public_key: bytes, secret: bytes) -> None:
        self.public_key = public_key
        self._secret = secret
        self.address = Hotkey(ss58.encode(public_key))

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """From a 32-byte mini secret.

        Raises:
            BadKey: Another length.
        """
        if len(seed) != _SEED_BYTES:
            raise BadKey(f"expected a seed of {_SEED_BYTES} bytes, got {len(seed)}")
        public_key, secret = sr25519.pair_from_seed(seed)
        return cls(bytes(public_key), bytes(secret))

    @classmethod
    def from_secret(cls, secret: bytes) -> Self:
        """From an expanded 64-byte secret key (as a keyfile's `privateKey` holds it).

        Raises:
            BadKey: Another length, or no key.
        """
        try:
            return cls(bytes(sr25519.public_from_secret_key(secret)), secret)
        except (ValueError, TypeError) as error:
            raise BadKey(f"expected a secret key of 64 bytes, got {len(secret)}") from error

    def derive(self, chain_code: bytes, *, hard: bool) -> Keypair:
        """The child key of one junction (32-byte chain code)."""
        parent = (chain_code, self.public_key, self._secret)
        derived = sr25519.hard_derive_keypair(parent, b"") if hard else sr25519.derive_keypair(parent, b"")
        return Keypair(bytes(derived[1]), bytes(derived[2]))

    def sign(self, message: bytes) -> bytes:
        """A signature, 64 bytes; sr25519 signatures are randomised."""
        return bytes(sr25519.sign((self.public_key, self._secret), message))

    def __repr__(self) -> str:
        return f"Keypair({self.address})"


def audience_of(url: str) -> str:
    """Lower-case `scheme://host[:port]` without the default port; ws and wss become http and https.

    Raises:
        BadUrl: Another scheme, no host, or a port that is no number.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadUrl(f"expected an http(s) URL, got {url!r}: {error}") from error
    scheme = _PLAIN_SCHEME.get(parts.scheme.lower())
    if scheme is None or not parts.hostname:
        raise BadUrl(f"expected an http(s) URL with a host, got {url!r}")
    host = parts.hostname.lower()
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}" if port in (None, _DEFAULT_PORTS[scheme]) else f"{scheme}://{shown}:{port}"


def signing_payload(
    *, method: str, path: str, body: bytes, timestamp_ms: int, nonce: str, audience: str, instance: str
) -> bytes:
    """The bytes that are signed. `path`: full path with query as sent; `instance`: empty for miners."""
    return "\n".join(
        [
            _LABEL,
            method.upper(),
            path,
            hashlib.sha256(body).hexdigest(),
            str(timestamp_ms),
            nonce,
            audience,
            instance,
        ]
    ).encode()


def sign_request(
    keypair: Keypair,
    *,
    method: str,
    path: str,
    body: bytes,
    audience: str,
    instance: str,
    timestamp_ms: int,
    nonce: str,
    role: Role = "validator",
) -> dict[str, str]:
    """The headers of a signed request. `nonce` is 32 hex digits, fresh for every try."""
    payload = signing_payload(
        method=method,
        path=path,
        body=body,
        timestamp_ms=timestamp_ms,
        nonce=nonce,
        audience=audience,
        instance=instance if role == "validator" else "",
    )
    headers = {
        "X-Validator-Hotkey" if role == "validator" else "X-Miner-Hotkey": keypair.address,
        "X-Timestamp": str(timestamp_ms),
        "X-Nonce": nonce,
        "X-Signature": keypair.sign(payload).hex(),
    }
    if role == "validator":
        headers["X-Validator-Instance"] = instance
    return headers


def verify(address: str, payload: bytes, signature: bytes) -> bool:
    """Whether `address` signed `payload`. A malformed signature is simply not valid.

    Raises:
        BadAddress: The address is none.
    """
    public_key = ss58.decode(address)
    try:
        return bool(sr25519.verify(signature, payload, public_key))
    except (ValueError, TypeError):
        return False
