"""The table of `validator cvms top`: what each CVM uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

REFRESH = 2.0
"""Seconds between two looks at the daemon, which itself samples every five."""
_BYTES = {
    "memory_bytes": "memory",
    "memory_peak_bytes": "peak",
    "disk_bytes": "disk",
    "network_bytes": "network",
}


def ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The daemon's rows, those that use the most memory now first."""
    return sorted(rows, key=lambda row: -(_used(row).get("memory_bytes") or 0))


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """They as a table; a dash where nothing is known."""
    shown = Table(*("name", "host", "stage", "challenge", "cpu", "cpu time", *_BYTES.values()))
    for row in ranked(rows):
        used = _used(row)
        share, time = used.get("cpu_percent"), used.get("cpu_time_ms")
        words = [escape(str(row.get(key, ""))) for key in ("name", "host", "stage", "challenge_id")]
        figures = [_bytes(used.get(key)) for key in _BYTES]
        shown.add_row(
            *words,
            "-" if share is None else f"{share:.0f} %",
            "-" if time is None else f"{time / 1000:.1f} s",
            *figures,
        )
    return shown


def _used(row: dict[str, Any]) -> dict[str, Any]:
    return row.get("usage") or {}


def _bytes(count: int | None) -> str:
    return "-" if count is None else decimal(count)
