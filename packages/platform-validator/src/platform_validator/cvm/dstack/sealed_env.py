"""A VM's environment, encrypted so that only the app's own VM can read it, by a key from the KMS.

The form is dstack's: X25519 with a fresh key, AES-256-GCM under the shared secret itself, and
`ephemeral key (32) || nonce (12) || ciphertext and tag`. Whoever holds the VMM could hand us a key of its
own, so the KMS's signature over the key and the app is checked against a signer that the operator pinned.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from platform_validator.attestation.keccak import keccak_256
from platform_validator.cvm.vmm import VmmRefused

_PREFIX = b"dstack-env-encrypt-pubkey:"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_MAX_VALUE, _MAX_ITEMS, _MAX_FILE = 128 * 1024, 1024, 256 * 1024
_APP_ID, _KEY, _SIGNATURE, _HALF = 20, 32, 65, 32
_FRESH = 600.0
"""Seconds by which a signature's time may differ from ours."""


class EnvKeyUntrusted(VmmRefused):
    """The key for the environment is not one that the pinned KMS signed: nothing was sent."""


@dataclass(frozen=True, slots=True)
class EnvKey:
    """GetAppEnvEncryptPubKey's answer. `signed_at` (Unix seconds) and `timed` are of v0.5.6 and newer."""

    public: bytes
    signature: bytes
    signed_at: int
    timed: bytes

    @classmethod
    def read(cls, answer: Mapping[str, Any]) -> EnvKey:
        """Of the answer's hex fields.

        Raises:
            EnvKeyUntrusted: They are none.
        """
        try:
            raw = [
                bytes.fromhex(answer.get(name) or "") for name in ("public_key", "signature", "signature_v1")
            ]
            return cls(raw[0], raw[1], int(answer.get("timestamp") or 0), raw[2])
        except (TypeError, ValueError) as error:
            raise EnvKeyUntrusted(f"the KMS's key is not in hex: {error}") from error

    def checked(self, app_id: bytes, signer: bytes, *, now: float | None = None) -> bytes:
        """The public key, if `signer` (compressed secp256k1) signed it for this app, and not long ago.

        Raises:
            EnvKeyUntrusted: It did not.
        """
        if len(self.public) != _KEY:
            raise EnvKeyUntrusted(f"the KMS's key: expected {_KEY} bytes, got {len(self.public)}")
        message, signature = _PREFIX + app_id + self.public, self.signature
        if self.timed:
            age = (time.time() if now is None else now) - self.signed_at
            if abs(age) > _FRESH:
                raise EnvKeyUntrusted(
                    f"the KMS signed its key {age:.0f} s ago: expected within {_FRESH:.0f} s"
                )
            stamp = self.signed_at.to_bytes(8, "big")
            message, signature = _PREFIX + app_id + stamp + self.public, self.timed
        if not _is_signed(message, signature, signer):
            raise EnvKeyUntrusted(f"the key for app {app_id.hex()} is not signed by the pinned KMS")
        return self.public


def app_id_of(compose: bytes) -> bytes:
    """By default: the first 20 bytes of the compose hash."""
    return hashlib.sha256(compose).digest()[:_APP_ID]


def require_allowed(compose: bytes, environment: Mapping[str, str]) -> None:
    """The guest must get keys from a KMS, and drops silently what its compose does not allow.

    Raises:
        VmmRefused: Something would not arrive.
    """
    document = json.loads(compose)
    if document.get("key_provider") != "kms" and not document.get("kms_enabled"):
        raise VmmRefused(
            "a sealed environment needs key_provider kms in app-compose: without a KMS it is ignored"
        )
    allowed = set(document.get("allowed_envs") or [])
    dropped = sorted(set(environment) - allowed)
    if dropped:
        raise VmmRefused(f"app-compose's allowed_envs lacks {', '.join(dropped)}: the guest would drop them")
    if len(environment) > _MAX_ITEMS:
        raise VmmRefused(f"a sealed environment holds at most {_MAX_ITEMS} values, not {len(environment)}")
    for name, value in environment.items():
        if not _NAME.fullmatch(name):
            raise VmmRefused(
                f"{name[:64]!r} is no name that a guest takes: letters, digits and _, at most 255"
            )
        if len(value.encode()) > _MAX_VALUE:
            raise VmmRefused(f"the value of {name} is over {_MAX_VALUE} bytes")


def seal(environment: Mapping[str, str], public: bytes) -> bytes:
    """Encrypt to the key; a fresh one of ours each time.

    Raises:
        VmmRefused: It is larger than a guest reads.
    """
    items = [{"key": name, "value": value} for name, value in environment.items()]
    plain = json.dumps({"env": items}, ensure_ascii=False, separators=(",", ":")).encode()
    ours = X25519PrivateKey.generate()
    shared = ours.exchange(X25519PublicKey.from_public_bytes(public))
    nonce = os.urandom(12)
    blob = ours.public_key().public_bytes_raw() + nonce + AESGCM(shared).encrypt(nonce, plain, None)
    if len(blob) > _MAX_FILE:
        raise VmmRefused(f"the sealed environment is {len(blob)} bytes: a guest reads at most {_MAX_FILE}")
    return blob


def _is_signed(message: bytes, signature: bytes, signer: bytes) -> bool:
    """A recoverable signature r || s || v; with the signer known, nothing needs to be recovered."""
    if len(signature) != _SIGNATURE:
        return False
    r, s = (int.from_bytes(signature[at : at + _HALF], "big") for at in (0, _HALF))
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256K1(), signer)
        key.verify(
            utils.encode_dss_signature(r, s),
            keccak_256(message),
            ec.ECDSA(utils.Prehashed(hashes.SHA256())),
        )
    except (InvalidSignature, ValueError):
        return False
    return True
