"""Time as the API keeps it, Unix milliseconds, and as it shows it, RFC 3339 UTC."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


def rfc3339(milliseconds: int) -> str:
    """RFC 3339 in UTC, such as `2026-01-02T03:04:05.678Z`."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def show_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its `…_at` columns in RFC 3339."""
    return {
        key: rfc3339(value) if key.endswith("_at") and isinstance(value, int) else value
        for key, value in row.items()
    }
