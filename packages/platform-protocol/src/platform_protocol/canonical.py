"""Canonical JSON (RFC 8785) of I-JSON values, and SHA-256 in hex."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import rfc8785

from platform_protocol.errors import ProtocolError

_MAX_SAFE = 2**53 - 1
_MAX_DEPTH = 64


class NotCanonical(ProtocolError):
    """A value that I-JSON (RFC 7493) does not know; the message names the key path."""


def sha256_hex(data: bytes) -> str:
    """SHA-256, 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The RFC 8785 form of a JSON value, UTF-8.

    Raises:
        NotCanonical: An integer beyond ±(2^53-1), a non-finite number, a lone surrogate, a key that is no
            string, nesting over 64, or a type that JSON does not have.
    """
    _check(value, "$", 0)
    return rfc8785.dumps(value)


def _check(value: Any, path: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise NotCanonical(f"{path}: nested over {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, path)
            _check(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, str):
        _check_text(value, path)
    elif value is not None and not isinstance(value, bool):
        _check_number(value, path)


def _check_number(value: Any, path: str) -> None:
    if isinstance(value, int):
        if abs(value) > _MAX_SAFE:
            raise NotCanonical(f"{path}: expected an integer within ±(2^53-1)")
    elif not isinstance(value, float):
        raise NotCanonical(f"{path}: {type(value).__name__} is not JSON")
    elif not math.isfinite(value):
        raise NotCanonical(f"{path}: expected a finite number, got {value}")


def _check_text(text: Any, path: str) -> None:
    if not isinstance(text, str):
        raise NotCanonical(f"{path}: expected string keys, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotCanonical(f"{path}: a lone surrogate") from error
