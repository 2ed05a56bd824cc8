"""Reads the CBOR that dstack's measurement documents use (RFC 8949): integers, bytes, text, maps.

Strict: definite lengths in their shortest form, text keys once each, nothing after the value.
"""

from __future__ import annotations

from platform_validator.errors import ValidatorError

_MAX = 64 * 1024
_MAX_DEPTH = 8
_UINT, _BYTES, _TEXT, _MAP = 0, 2, 3, 5
_INLINE = 24

Value = int | bytes | str | dict[str, "Value"]


class CborInvalid(ValidatorError):
    """Not such a document."""


def read_cbor(data: bytes) -> Value:
    """The one value of a document.

    Raises:
        CborInvalid: Another form, over 64 KiB, or deeper than 8.
    """
    if len(data) > _MAX:
        raise CborInvalid(f"expected at most {_MAX} bytes, got {len(data)}")
    value, end = _value(data, 0, 0)
    if end != len(data):
        raise CborInvalid(f"{len(data) - end} bytes after the value")
    return value


def _value(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    if depth > _MAX_DEPTH:
        raise CborInvalid(f"deeper than {_MAX_DEPTH}")
    kind, number, at = _head(data, at)
    if kind == _UINT:
        return number, at
    if kind in (_BYTES, _TEXT):
        if number > len(data) - at:
            raise CborInvalid("it ends early")
        found = data[at : at + number]
        if kind == _BYTES:
            return found, at + number
        try:
            return found.decode(), at + number
        except UnicodeDecodeError as error:
            raise CborInvalid("text that is no UTF-8") from error
    if kind != _MAP:
        raise CborInvalid(f"expected integers, bytes, text and maps, got major type {kind}")
    table: dict[str, Value] = {}
    for _ in range(number):
        key, at = _value(data, at, depth + 1)
        if not isinstance(key, str) or key in table:
            raise CborInvalid("expected text keys, once each")
        table[key], at = _value(data, at, depth + 1)
    return table, at


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """(major type, number, where the rest begins)."""
    if at >= len(data):
        raise CborInvalid("it ends early")
    kind, short = data[at] >> 5, data[at] & 0x1F
    if short < _INLINE:
        return kind, short, at + 1
    width = {24: 1, 25: 2, 26: 4, 27: 8}.get(short)
    raw = data[at + 1 : at + 1 + (width or 0)]
    if width is None or len(raw) != width:
        raise CborInvalid("a length that is indefinite or cut off")
    number = int.from_bytes(raw, "big")
    if number < (_INLINE if width == 1 else 1 << (4 * width)):
        raise CborInvalid("a length that is not in its shortest form")
    return kind, number, at + 1 + width
