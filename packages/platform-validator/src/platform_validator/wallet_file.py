"""Encrypted Bittensor key files: what is in one, given its password. Only hotkeys are ever opened here.

The form `$NACL` (bittensor-wallet 1 to 4): those five bytes, then a libsodium secretbox (its nonce first)
under Argon2i of the password with one published salt, at libsodium's "sensitive" limits: 8 passes over
512 MiB, a few seconds. Older forms are named and refused: the wallet tool converts them.
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from nacl import pwhash
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from platform_validator.errors import ValidatorError

NACL = b"$NACL"
OLDER = (b"$ANSIBLE_VAULT", b"gAAAA")
_SALT = b"\x13q\x83\xdf\xf1Z\t\xbc\x9c\x90\xb5Q\x879\xe9\xb1"
_MAX_PASSWORD = 4096

Ask = Callable[[Path], bytearray | None]
"""The password of a key file, to be zeroed after use; None where there is none."""


class PasswordUnusable(ValidatorError):
    """No password, a wrong one, or a password file that others can read."""


def is_encrypted(data: bytes) -> bool:
    """Whether it is one of the wallet's encrypted forms."""
    return data.startswith((NACL, *OLDER))


def open_key_file(path: Path, data: bytes, ask: Ask) -> bytes:
    """The keyfile's JSON.

    Raises:
        PasswordUnusable: No password, or not that of this file; or a form that is not read here.
    """
    if data.startswith(OLDER):
        raise PasswordUnusable(
            f"{path} is encrypted in a form that the wallet tool has given up: update it there"
            " (btcli wallet update), and use what it writes"
        )
    password = ask(path)
    if password is None:
        raise PasswordUnusable(
            f"{path} is encrypted: give its password in a file (VALIDATOR_HOTKEY_PASSWORD_FILE, or the"
            " service credential hotkey.password), or start the validator in a terminal"
        )
    try:
        key = pwhash.argon2i.kdf(
            SecretBox.KEY_SIZE,
            bytes(password),
            _SALT,
            opslimit=pwhash.argon2i.OPSLIMIT_SENSITIVE,
            memlimit=pwhash.argon2i.MEMLIMIT_SENSITIVE,
        )
        return SecretBox(key).decrypt(data[len(NACL) :])
    except (CryptoError, ValueError) as error:
        raise PasswordUnusable(f"{path}: the password is not that of this file, or it is damaged") from error
    finally:
        password[:] = bytes(len(password))


def password_source(password_file: Path | None, credentials: Path | None) -> Ask:
    """Where passwords come from: a file, the service credential `hotkey.password`, else the terminal."""
    credential = credentials / "hotkey.password" if credentials is not None else None

    def ask(path: Path) -> bytearray | None:
        for place in (password_file, credential):
            if place is not None and (place == password_file or place.exists()):
                return _from_file(place)
        if sys.stdin.isatty():
            return bytearray(getpass.getpass(f"password of {path}: ").encode())
        return None

    return ask


def _from_file(path: Path) -> bytearray:
    """Its first line, without the newline."""
    try:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise PasswordUnusable(f"{path} can be read by others: chmod 600 {path}")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = bytearray(os.read(descriptor, _MAX_PASSWORD))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise PasswordUnusable(f"{path} cannot be read: {error.strerror}") from error
    end = data.find(b"\n")
    if end >= 0:
        data[end:] = b""
    return data
