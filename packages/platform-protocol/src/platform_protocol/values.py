"""What a dynamic value and its key may be: the same at both ends of a session."""

from __future__ import annotations

from typing import Any

from platform_protocol.canonical import NotCanonical, canonical_json
from platform_protocol.errors import ProtocolError

MAX_KEY_BYTES = 512
"""A key: 1 to that many bytes of UTF-8, printable."""
MAX_VALUE_BYTES = 1024 * 1024
"""A value: I-JSON, that many bytes at most in its RFC 8785 form."""


class ValueInvalid(ProtocolError):
    """A key or value that cannot be kept; `code` is `bad_key`, `not_json` or `value_too_large`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def checked_key(key: str) -> str:
    """The key itself.

    Raises:
        ValueInvalid: `bad_key`.
    """
    if not key:
        raise ValueInvalid("bad_key", f"expected a key of 1 to {MAX_KEY_BYTES} bytes, got an empty one")
    return checked_prefix(key)


def checked_prefix(prefix: str) -> str:
    """The beginning of keys, or none.

    Raises:
        ValueInvalid: `bad_key`.
    """
    try:
        size = len(prefix.encode())
    except UnicodeEncodeError as error:
        raise ValueInvalid("bad_key", "expected Unicode text, got a lone surrogate") from error
    if size > MAX_KEY_BYTES:
        raise ValueInvalid("bad_key", f"expected a key of at most {MAX_KEY_BYTES} bytes, got {size}")
    if prefix and not prefix.isprintable():
        raise ValueInvalid("bad_key", f"expected printable text, got {prefix[:80]!r}")
    return prefix


def value_text(value: Any) -> bytes:
    """The RFC 8785 form of a value.

    Raises:
        ValueInvalid: `not_json` or `value_too_large`.
    """
    try:
        text = canonical_json(value)
    except NotCanonical as error:
        raise ValueInvalid("not_json", f"not a JSON value that can be kept: {error}") from error
    if len(text) > MAX_VALUE_BYTES:
        raise ValueInvalid(
            "value_too_large", f"expected a value of at most {MAX_VALUE_BYTES} bytes, got {len(text)}"
        )
    return text
