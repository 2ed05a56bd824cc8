"""The JSON rules: every field may be missing, unknown ones are ignored, null is for optional ones only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_HEX = re.compile(r"(0x)?((?:[0-9a-fA-F]{2})*)")
_U32 = 2**32 - 1


class Refused(Exception):
    """Answered 400: `context` is what was being done, `cause` why it failed."""

    def __init__(self, context: str, cause: str) -> None:
        super().__init__(f"{context}: {cause}")
        self.context = context
        self.cause = cause


Reader = Callable[[str, Any], Any]


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a string")
    return value


def whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _U32:
        raise _wrong(name, value, "u32")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "a boolean")
    return value


def data(name: str, value: Any) -> str:
    """Bytes travel as hex; they are shown in lower case, without 0x."""
    found = _HEX.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise _wrong(name, value, "hex bytes")
    return found.group(2).lower()


def optional(inner: Reader) -> Reader:
    return lambda name, value: None if value is None else inner(name, value)


def many(inner: Reader) -> Reader:
    def read(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong(name, value, "a sequence")
        return [inner(f"{name}[{at}]", one) for at, one in enumerate(value)]

    return read


def message(fields: Mapping[str, tuple[Reader, Any]]) -> Reader:
    """A message of these fields, each with its reader and its default."""

    def read(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(name, value, "an object")
        return {
            key: reader(key, value[key]) if key in value else default
            for key, (reader, default) in fields.items()
        }

    return read


PORT = message(
    {"protocol": (text, ""), "host_port": (whole, 0), "vm_port": (whole, 0), "host_address": (text, "")}
)
GPUS = message({"attach_mode": (text, ""), "gpus": (many(message({"slot": (text, "")})), [])})
CONFIGURATION: dict[str, tuple[Reader, Any]] = {
    "name": (text, ""),
    "image": (text, ""),
    "compose_file": (text, ""),
    "vcpu": (whole, 0),
    "memory": (whole, 0),
    "disk_size": (whole, 0),
    "ports": (many(PORT), []),
    "encrypted_env": (data, ""),
    "app_id": (optional(data), None),
    "user_config": (text, ""),
    "hugepages": (flag, False),
    "pin_numa": (flag, False),
    "gpus": (optional(GPUS), None),
    "kms_urls": (many(text), []),
    "gateway_urls": (many(text), []),
    "stopped": (flag, False),
    "no_tee": (flag, False),
    "networking": (optional(message({"mode": (text, ""), "bridge_name": (text, "")})), None),
    "networks": (many(message({"mode": (text, ""), "bridge_name": (text, "")})), []),
    "simulated_tee": (optional(text), None),
}
ID = message({"id": (text, "")})
STATUS = message(
    {
        "ids": (many(text), []),
        "brief": (flag, False),
        "keyword": (text, ""),
        "page": (whole, 0),
        "page_size": (whole, 0),
    }
)
UPDATE = message(
    {
        "id": (text, ""),
        "compose_file": (text, ""),
        "encrypted_env": (data, ""),
        "user_config": (text, ""),
        "update_ports": (flag, False),
        "ports": (many(PORT), []),
        "gpus": (optional(GPUS), None),
        "vcpu": (optional(whole), None),
        "memory": (optional(whole), None),
        "disk_size": (optional(whole), None),
        "image": (optional(text), None),
    }
)
APP = message({"app_id": (data, "")})


def configuration(known: frozenset[str]) -> Reader:
    """VmConfiguration with those of the later fields that this version knows."""
    later = {"kms_urls", "gateway_urls", "stopped", "no_tee", "networking", "networks", "simulated_tee"}
    return message({key: one for key, one in CONFIGURATION.items() if key not in later or key in known})


def _wrong(name: str, value: Any, expected: str) -> Refused:
    shown = "null" if value is None else type(value).__name__
    return Refused("Failed to decode request", f"{name}: invalid type: {shown}, expected {expected}")
