"""The state directory's keys: seals what the journal may not show in clear (AES-256-GCM, key files 0600)."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from platform_validator.errors import ValidatorError

_KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = b"\x01"


class KeyringBroken(ValidatorError):
    """A key file is missing its bytes, or sealed data does not open."""


class Keyring:
    """One key, made at the first start in `folder/master.key`."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    @classmethod
    def open_or_create(cls, folder: Path) -> Keyring:
        """Read the key, or make it.

        Raises:
            KeyringBroken: The file has another length.
            OSError: It cannot be read or written.
        """
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / "master.key"
        if not path.exists():
            scratch = folder / ".master.key"
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(path)
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise KeyringBroken(
                f"{path}: expected {_KEY_BYTES} bytes, found {len(key)}: restore it from a backup"
            )
        return cls(key)

    def seal(self, data: bytes, context: bytes) -> bytes:
        """Encrypt; `context` says what it is and must be given again to open it."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _VERSION + nonce + self._cipher.encrypt(nonce, data, context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """Decrypt.

        Raises:
            KeyringBroken: Changed, of another context, or under another key.
        """
        nonce, body = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            if sealed[:1] != _VERSION:
                raise KeyringBroken("sealed data of another version")
            return self._cipher.decrypt(nonce, body, context)
        except (InvalidTag, ValueError) as error:
            raise KeyringBroken("sealed data does not open: changed, or under another key") from error
