"""Finds the hotkey's private key, by its address; never prints it."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from pathlib import Path

from mnemonic import Mnemonic

from platform_protocol.signing import BadKey, Keypair
from platform_validator.errors import ValidatorError
from platform_validator.wallet_file import Ask, PasswordUnusable, is_encrypted, open_key_file, password_source

_SEED = re.compile(r"0x([0-9a-fA-F]{64})")
_JUNCTION = re.compile(r"(//?)([^/]+)")
_JUNCTION_BYTES = 32
_MAX_FILE = 64 * 1024
_WALLETS = ".bittensor/wallets"


class KeyNotFound(ValidatorError):
    """No usable private key; the message lists where was looked, and what was found there."""


class KeyUnusable(ValidatorError):
    """A key is there and cannot be used: readable by others, locked, malformed, or another address."""


def find_hotkey(
    address: str,
    *,
    passphrase: str | None,
    hotkey_file: Path | None,
    home: Path,
    credentials: Path | None = None,
    password_file: Path | None = None,
) -> Keypair:
    """The key pair of `address`.

    Looked for in HOTKEY_PASSPHRASE, the hotkey file, the service credential `hotkey` (systemd's
    CREDENTIALS_DIRECTORY), and every wallet's hotkeys below `home`. An encrypted file's password comes from
    `password_file`, the credential `hotkey.password`, or the terminal. Coldkeys are never read.

    Raises:
        KeyNotFound: None of them has it.
        KeyUnusable: One that was named cannot be used, or is another address.
    """
    looked: list[str] = []
    ask = password_source(password_file, credentials)
    if passphrase is not None:
        return _same(keypair_from_text(passphrase), address, "HOTKEY_PASSPHRASE")
    credential = credentials / "hotkey" if credentials is not None else None
    for path in (hotkey_file, credential):
        if path is None:
            continue
        if path.exists():
            return _same(_read(path, ask), address, str(path))
        looked.append(f"{path}: not there")
    for path in sorted((home / _WALLETS).glob("*/hotkeys/*")):
        found = _address_in(path)
        if found == address:
            return _same(_read(path, ask), address, str(path))
        if path.suffix != ".txt":
            what = "another address" if found else "encrypted, without its address beside it: name it"
            looked.append(f"{path}: {what}")
    looked.append(f"{home / _WALLETS}/*/hotkeys/*: no key with ss58Address {address}")
    raise KeyNotFound(
        f"no private key for {address}. Looked in: {'; '.join(looked)}. "
        "Set VALIDATOR_HOTKEY_FILE or HOTKEY_PASSPHRASE, or put the wallet there."
    )


def keypair_from_text(text: str) -> Keypair:
    """A `0x` seed, or a mnemonic with an optional derivation path (`//hard/soft`); no password.

    Raises:
        KeyUnusable: Neither.
    """
    found = _SEED.fullmatch(text.strip())
    if found is not None:
        return Keypair.from_seed(bytes.fromhex(found[1]))
    words, slash, path = text.strip().partition("/")
    words = " ".join(words.split())
    if not Mnemonic("english").check(words):
        raise KeyUnusable(
            "expected a 0x seed of 64 hex digits or a BIP-39 mnemonic: its checksum does not hold"
        )
    entropy = bytes(Mnemonic("english").to_entropy(words))
    # Substrate derives from the entropy, not from the words (substrate-bip39).
    seed = hashlib.pbkdf2_hmac("sha512", entropy, b"mnemonic", 2048)[:32]
    keypair = Keypair.from_seed(seed)
    for kind, name in _JUNCTION.findall(slash + path):
        keypair = keypair.derive(_chain_code(name), hard=kind == "//")
    return keypair


def _chain_code(name: str) -> bytes:
    """SCALE: a number as u64 little-endian, else compact length and UTF-8; hashed when over 32 bytes."""
    if name.isdigit():
        code = int(name).to_bytes(8, "little")
    else:
        data = name.encode()
        if len(data) >= 64:  # noqa: PLR2004 - SCALE's one-byte compact lengths end there
            raise KeyUnusable("a derivation junction is over 63 bytes")
        code = bytes([len(data) << 2]) + data
    if len(code) > _JUNCTION_BYTES:
        code = hashlib.blake2b(code, digest_size=_JUNCTION_BYTES).digest()
    return code.ljust(_JUNCTION_BYTES, b"\0")


def _read(path: Path, ask: Ask) -> Keypair:
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyUnusable(f"{path} can be read by others: chmod 600 {path}")
        with path.open("rb") as file:
            data = file.read(_MAX_FILE)
    except OSError as error:
        raise KeyUnusable(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = (open_key_file(path, data, ask) if is_encrypted(data) else data).decode()
        value = json.loads(text) if text.lstrip().startswith("{") else None
        if not isinstance(value, dict):
            return keypair_from_text(text)
        return _from_keyfile(value)
    except PasswordUnusable as error:
        raise KeyUnusable(str(error)) from error
    except (ValueError, BadKey) as error:
        raise KeyUnusable(
            f"{path}: expected a Bittensor keyfile, a mnemonic or a 0x seed: {type(error).__name__}"
        ) from None


def _from_keyfile(value: dict[str, object]) -> Keypair:
    for name in ("secretSeed", "secretPhrase"):
        found = value.get(name)
        if isinstance(found, str) and found:
            return keypair_from_text(found)
    private = value.get("privateKey")
    if isinstance(private, str) and private:
        return Keypair.from_secret(bytes.fromhex(private.removeprefix("0x")))
    raise ValueError("no secretSeed, secretPhrase or privateKey in it")


def _address_in(path: Path) -> str | None:
    """What a key file says of itself; of an encrypted one, what the wallet wrote beside it."""
    for place in (path, path.with_name(f"{path.name}pub.txt")):
        try:
            with place.open("rb") as file:
                value = json.loads(file.read(_MAX_FILE))
        except (OSError, ValueError):
            continue
        found = value.get("ss58Address") if isinstance(value, dict) else None
        if isinstance(found, str):
            return found
    return None


def _same(keypair: Keypair, address: str, where: str) -> Keypair:
    if keypair.address != address:
        raise KeyUnusable(f"{where} holds the key of {keypair.address}, and VALIDATOR_HOTKEY is {address}")
    return keypair
