"""`[[vmm]]`: the VMM hosts of a validator that has several, one table each."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platform_validator.config import parse
from platform_validator.errors import ValidatorError
from platform_validator.host_name import HostName

_KEYS = (
    "name",
    "url",
    "base_url",
    "egress_url",
    "port_address",
    "port_range",
    "limits",
    "labels",
    "credentials_file",
)
_LIMITS = ("cpu_cores", "memory_mb", "disk_mb", "gpu_count", "max_cvms")
_WORD = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_NAMES = {"DSTACK_VMM_TOKEN": "token", "DSTACK_VMM_AUTH_USER": "user", "DSTACK_VMM_AUTH_PASSWORD": "password"}


class CredentialsUnusable(ValidatorError):
    """A host's credentials file cannot be used."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a VMM is asked with: a token, or a user and a password."""

    token: str | None = None
    user: str | None = None
    password: str | None = None


@dataclass(frozen=True, slots=True)
class HostSettings:
    """One host. `limits` None, or a kind of them that is not given: the totals alone bound it.

    `base_url` and `egress_url` are the validator and its egress proxy as CVMs there reach them.
    `port_range` None: it has the ports of `dstack.port_range`, with all others under its `port_address`.
    """

    name: HostName
    url: str
    base_url: str | None = None
    egress_url: str | None = None
    port_address: str = "127.0.0.1"
    port_range: tuple[int, int] | None = None
    limits: Mapping[str, int] | None = None
    labels: tuple[str, ...] = ()
    credentials_file: Path | None = None


def hosts(value: Any) -> tuple[HostSettings, ...]:
    """An array of tables. Raises ValueError with all faults in it."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError("expected tables [[vmm]]")
    faults: list[str] = []
    found = tuple(_host(each, number, faults) for number, each in enumerate(value, 1))
    for what, mine in (("name", [str(one.name) for one in found]), ("url", [one.url for one in found])):
        faults += [f"two hosts have the {what} {each}" for each in sorted(set(mine)) if mine.count(each) > 1]
    if faults:
        raise ValueError("; ".join(faults))
    return found


def read_credentials(path: Path) -> Credentials:
    """A bare token, or lines `DSTACK_VMM_TOKEN=…`, `DSTACK_VMM_AUTH_USER=…`, `DSTACK_VMM_AUTH_PASSWORD=…`.

    Raises:
        CredentialsUnusable: It is not there, others can read it, or it has something else in it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(65_536).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialsUnusable(f"{path} cannot be read: {error}") from error
    if mode & _OTHERS:
        raise CredentialsUnusable(f"{path} can be read by others: chmod 600 {path}")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    pairs = [line.partition("=") for line in lines]
    if lines and all(name in _NAMES for name, _, _ in pairs):
        return Credentials(**{_NAMES[name]: given for name, _, given in pairs})
    if len(lines) == 1 and not re.search(r"\s", lines[0]):
        return Credentials(token=lines[0])
    raise CredentialsUnusable(f"{path}: expected a token alone, or lines {'=…, '.join(_NAMES)}=…")


def _host(table: Mapping[str, Any], number: int, faults: list[str]) -> HostSettings:
    where = f"host {number}" + (f" ({table['name']})" if isinstance(table.get("name"), str) else "")

    def take(key: str, parser: parse.Parser, default: Any) -> Any:
        if key not in table:
            if default is None and key in {"name", "url"}:
                faults.append(f"{where}: {key} is required")
            return default
        try:
            return parser(table[key])
        except ValueError as error:
            faults.append(f"{where}: {key}: {error}, got {table[key]!r}"[:200])
            return default

    faults += [f"{where}: {_unknown(key, _KEYS)}" for key in table if key not in _KEYS]
    file = take("credentials_file", parse.text, None)
    return HostSettings(
        name=HostName(take("name", _word, None) or f"#{number}"),
        url=take("url", parse.vmm_url, None) or f"#{number}",
        base_url=take("base_url", parse.web_url, None),
        egress_url=take("egress_url", parse.web_url, None),
        port_address=take("port_address", parse.text, "127.0.0.1"),
        port_range=take("port_range", parse.port_range, None),
        limits=take("limits", _limits, None),
        labels=take("labels", parse.listing(_word), ()),
        credentials_file=None if file is None else Path(file),
    )


def _limits(value: Any) -> dict[str, int]:
    if not isinstance(value, dict):
        raise ValueError("expected a table such as { cpu_cores = 8 }")  # noqa: TRY004 - parsers raise ValueError
    unknown = [key for key in value if key not in _LIMITS]
    if unknown:
        raise ValueError(_unknown(unknown[0], _LIMITS))
    return {key: parse.whole(0 if key == "gpu_count" else 1)(each) for key, each in value.items()}


def _word(value: Any) -> str:
    if not isinstance(value, str) or not _WORD.fullmatch(value):
        raise ValueError("expected up to 40 of a-z, 0-9 and -")
    return value


def _unknown(key: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown setting {key}" + (f": did you mean {near[0]}?" if near else "")
