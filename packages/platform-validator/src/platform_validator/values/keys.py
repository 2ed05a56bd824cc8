"""Where the keys come from that values are sealed under, and how the next one is made.

| source | the key | a new one |
|---|---|---|
| keyring | the highest `keyring/values/NNNN.key` (32 bytes, 0600) | the next number |
| credential | the service's `values.key` (32 bytes or 64 hex digits) | is given, with `values.key.old` |
| dstack | the guest agent's GetKey for a path with a generation (inside a TEE) | the next generation |
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import socket
from pathlib import Path
from typing import NamedTuple, Protocol

from platform_validator.values.errors import ValueKeysUnusable
from platform_validator.values.sealing import KEY_BYTES, ValueKey

_FILE = re.compile(r"([0-9]{4})\.key")
_AGENT_PATH = "platform-validator/values"
_TIMEOUT = 10.0
_OK = 200
_MAX = 1024 * 1024
_MARK = "sealed"


class ValueKeys(NamedTuple):
    """Every key that may be needed, oldest first; the last is the active one.

    `clear`: an older version may have left values in clear, which were never sealed yet.
    """

    keys: tuple[ValueKey, ...]
    clear: bool


class ValueKeySource(Protocol):
    """Blocking: called at the start, and from a thread while values are rekeyed."""

    def load(self) -> ValueKeys:
        """The keys; one is made where there is none.

        Raises:
            ValueKeysUnusable: They cannot be had.
        """

    def advance(self) -> ValueKeys:
        """The same with a new active key, durable when this returns. Raises ValueKeysUnusable."""

    def settled(self) -> None:
        """Everything is sealed under the active key: older ones are forgotten. Raises ValueKeysUnusable."""


class MemoryKeys:
    """Keys that are gone with the process: for tests and simulations."""

    def __init__(self, secret: bytes | None = None, *, clear: bool = False) -> None:
        self._keys = [ValueKey(secret or secrets.token_bytes(KEY_BYTES))]
        self._clear = clear

    def load(self) -> ValueKeys:
        """See the port."""
        return ValueKeys(tuple(self._keys), self._clear)

    def advance(self) -> ValueKeys:
        """See the port."""
        self._keys.append(ValueKey(secrets.token_bytes(KEY_BYTES)))
        return self.load()

    def settled(self) -> None:
        """See the port."""
        self._keys, self._clear = self._keys[-1:], False


class KeyringFiles:
    """Files in a folder of the state directory's keyring."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> ValueKeys:
        """See the port."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            numbers = self._numbers()
            keys = tuple(self._read(number) for number in numbers) if numbers else (self._make(1),)
            return ValueKeys(keys, not _is_marked(self._folder))
        except OSError as error:
            raise ValueKeysUnusable(f"{self._folder} cannot be used: {error.strerror or error}") from error

    def advance(self) -> ValueKeys:
        """See the port."""
        present = self.load()
        try:
            return ValueKeys((*present.keys, self._make(self._numbers()[-1] + 1)), present.clear)
        except OSError as error:
            raise ValueKeysUnusable(f"no new key in {self._folder}: {error.strerror or error}") from error

    def settled(self) -> None:
        """See the port."""
        try:
            for number in self._numbers()[:-1]:
                self._path(number).unlink()
            _mark(self._folder)
        except OSError as error:
            raise ValueKeysUnusable(f"{self._folder} cannot be changed: {error.strerror or error}") from error

    def _numbers(self) -> list[int]:
        found = (_FILE.fullmatch(entry.name) for entry in self._folder.iterdir())
        return sorted(int(each[1]) for each in found if each is not None)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:04}.key"

    def _read(self, number: int) -> ValueKey:
        return ValueKey(_checked(self._path(number), self._path(number).read_bytes()))

    def _make(self, number: int) -> ValueKey:
        """Durable before anything is sealed under it: a key that a crash took would take the values too."""
        secret = secrets.token_bytes(KEY_BYTES)
        scratch = self._folder / ".new.key"
        scratch.unlink(missing_ok=True)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(self._path(number))
        _sync(self._folder)
        return ValueKey(secret)


class CredentialKeys:
    """Files that the service manager gives (systemd: LoadCredential=values.key:…).

    Args:
        credentials: The service's CREDENTIALS_DIRECTORY.
        folder: Of the keyring, for a mark.
        name: Of the credential.
    """

    def __init__(self, credentials: Path | None, folder: Path, name: str = "values.key") -> None:
        self._credentials = credentials
        self._folder = folder
        self._name = name

    def load(self) -> ValueKeys:
        """See the port."""
        if self._credentials is None:
            raise ValueKeysUnusable(
                f"values.key_source is credential, and the service has none: LoadCredential={self._name}:…"
            )
        old = self._credentials / f"{self._name}.old"
        paths = [*([old] if old.exists() else []), self._credentials / self._name]
        try:
            keys = tuple(ValueKey(_checked(path, path.read_bytes())) for path in paths)
        except OSError as error:
            raise ValueKeysUnusable(f"{paths[-1]} cannot be read: {error.strerror or error}") from error
        return ValueKeys(keys, not _is_marked(self._folder))

    def advance(self) -> ValueKeys:
        """See the port."""
        keys = self.load()
        if len(keys.keys) == 1:
            raise ValueKeysUnusable(
                f"give the new key as the credential {self._name} and the present one as {self._name}.old,"
                " restart, and rekey again"
            )
        return keys

    def settled(self) -> None:
        """See the port. The operator removes `values.key.old`."""
        try:
            _mark(self._folder)
        except OSError as error:
            raise ValueKeysUnusable(f"{self._folder} cannot be changed: {error.strerror or error}") from error


class AgentKeys:
    """The guest agent's GetKey, where the validator itself runs in a CVM: the key is on no disk.

    `folder` keeps the number of the generation, which is no secret.
    """

    def __init__(self, socket_path: Path, folder: Path) -> None:
        self._socket = socket_path
        self._folder = folder

    def load(self) -> ValueKeys:
        """See the port."""
        oldest, newest = self._generations()
        keys = tuple(self._ask(number) for number in range(oldest, newest + 1))
        return ValueKeys(keys, not _is_marked(self._folder))

    def advance(self) -> ValueKeys:
        """See the port."""
        oldest, newest = self._generations()
        self._write(oldest, newest + 1)
        return self.load()

    def settled(self) -> None:
        """See the port."""
        oldest, newest = self._generations()
        if oldest != newest:
            self._write(newest, newest)
        try:
            _mark(self._folder)
        except OSError as error:
            raise ValueKeysUnusable(f"{self._folder} cannot be changed: {error.strerror or error}") from error

    def _generations(self) -> tuple[int, int]:
        path = self._folder / "generations"
        try:
            if not path.exists():
                self._write(1, 1)
            oldest, newest = map(int, path.read_text().split())
        except (OSError, ValueError) as error:
            raise ValueKeysUnusable(f"{path} cannot be used: {error}") from error
        return oldest, newest

    def _write(self, oldest: int, newest: int) -> None:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            scratch = self._folder / ".generations"
            with scratch.open("w") as file:
                file.write(f"{oldest} {newest}\n")
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(self._folder / "generations")
            _sync(self._folder)
        except OSError as error:
            raise ValueKeysUnusable(f"{self._folder} cannot be written: {error.strerror or error}") from error

    def _ask(self, generation: int) -> ValueKey:
        asked = {"path": f"{_AGENT_PATH}/{generation}", "purpose": "platform-values"}
        connection = http.client.HTTPConnection("dstack", timeout=_TIMEOUT)
        try:
            connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.sock.settimeout(_TIMEOUT)
            connection.sock.connect(str(self._socket))
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/GetKey", body=json.dumps(asked), headers=headers)
            answer = connection.getresponse()
            body = answer.read(_MAX)
            if answer.status != _OK:
                raise ValueKeysUnusable(f"GetKey at {self._socket}: HTTP {answer.status}")
            secret = bytes.fromhex(json.loads(body)["key"].removeprefix("0x"))
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueKeysUnusable(f"GetKey at {self._socket} gave no key: {error}") from error
        finally:
            connection.close()
        if len(secret) != KEY_BYTES:
            raise ValueKeysUnusable(f"GetKey: expected {KEY_BYTES} bytes, got {len(secret)}")
        return ValueKey(secret)


def _checked(path: Path, data: bytes) -> bytes:
    if len(data) == KEY_BYTES:
        return data
    try:
        secret = bytes.fromhex(data.decode("ascii").strip())
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise ValueKeysUnusable(
            f"{path}: expected {KEY_BYTES} bytes or {2 * KEY_BYTES} hex digits, found {len(data)} bytes:"
            " restore it from a backup"
        )
    return secret


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mark(folder: Path) -> None:
    """Nothing in clear is left: what is in clear later was put there by somebody else."""
    folder.mkdir(mode=0o700, exist_ok=True)
    os.close(os.open(folder / _MARK, os.O_WRONLY | os.O_CREAT, 0o600))


def _is_marked(folder: Path) -> bool:
    return (folder / _MARK).exists()
