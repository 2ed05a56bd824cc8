"""The secrets that a validator's settings lead to, so that nothing that goes out holds one of them."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from platform_validator.config import OPTIONS, Settings

_FILES = ("keys.hotkey_file", "keys.password_file", "sources.credentials_file", "sources.ssh_key_file")
_STATE = ("admin.token", "keyring/**/*")
_WALLETS = ".bittensor/wallets/*/hotkeys/*"
_PUBLIC = frozenset({"accountId", "publicKey", "ss58Address"})
_MAX_FILE = 64 * 1024
_FRAME = (b"-----", b"#")
"""Lines of a key file that are no part of the key."""
_LEAST = 6
"""Bytes of what is looked for: anything shorter is found everywhere."""


@dataclass(frozen=True, slots=True)
class KnownSecrets:
    """Secrets by where they come from; each in the forms in which it might turn up."""

    forms: Mapping[str, frozenset[bytes]] = field(repr=False)

    @classmethod
    def of(cls, settings: Settings, environment: Mapping[str, str], home: Path) -> KnownSecrets:
        """Of settings that are secret, files that they name, the state directory, and wallets' hotkeys."""
        forms: dict[str, set[bytes]] = {}
        for option in OPTIONS:
            value = settings.origins[option.key].value
            if option.secret and value:
                forms.setdefault(option.key, set()).update(_forms(str(value).encode()))
        for name, path in _places(settings, environment, home):
            with contextlib.suppress(OSError):
                for secret in _secrets_in(path.read_bytes()[:_MAX_FILE]):
                    forms.setdefault(name, set()).update(_forms(secret))
        return cls({name: frozenset(each) for name, each in forms.items() if each})

    def found_in(self, data: bytes) -> list[str]:
        """The names of those that are in it."""
        return sorted(name for name, forms in self.forms.items() if any(form in data for form in forms))

    def hidden(self, text: str) -> str:
        """The text, or that it would show a secret."""
        return "(its reason would show a secret)" if self.found_in(text.encode()) else text


def _places(settings: Settings, environment: Mapping[str, str], home: Path) -> Iterator[tuple[str, Path]]:
    for key in _FILES:
        if settings[key]:
            yield key, Path(settings[key])
    for host in settings.hosts:
        if host.credentials_file is not None:
            yield f"credentials of VMM host {host.name}", host.credentials_file
    for path in sorted(home.glob(_WALLETS)):
        yield f"hotkey {path.name}", path
    folder = settings.db_path.parent
    for pattern in _STATE:
        for path in filter(Path.is_file, sorted(folder.glob(pattern))):
            yield str(path.relative_to(folder)), path
    credentials = environment.get("CREDENTIALS_DIRECTORY")
    if credentials:
        for path in sorted(Path(credentials).iterdir()):
            yield f"credential {path.name}", path


def _secrets_in(data: bytes) -> Iterator[bytes]:
    """The whole of a file, each of its lines, and in a key file or a list of URLs what is secret of them."""
    yield data
    yield data.strip()
    with contextlib.suppress(ValueError):
        value = json.loads(data)
        if isinstance(value, dict):
            texts = {name: one for name, one in value.items() if isinstance(one, str)}
            yield from (one.encode() for name, one in texts.items() if name not in _PUBLIC)
            return
    for line in data.splitlines():
        if not line.startswith(_FRAME):
            yield line.strip()
        yield line.partition(b"=")[2].strip()
        yield from re.findall(rb"://[^:/@\s]*:([^@\s]+)@", line)


def _forms(secret: bytes) -> set[bytes]:
    """As it is, in hex and in base64; of hexadecimal text also the bytes that it stands for."""
    plain = {secret}
    with contextlib.suppress(ValueError):
        plain.add(bytes.fromhex(secret.decode().removeprefix("0x")))
        plain.add(secret.removeprefix(b"0x"))
    forms = {form for one in plain for form in (one, one.hex().encode(), base64.b64encode(one).rstrip(b"="))}
    return {form for form in forms if len(form) >= _LEAST}
