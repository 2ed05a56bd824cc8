"""What the API answers when it says no: problem details with a stable code."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An RFC 9457 answer: HTTP status, `code` (a stable snake_case word), a sentence, and extra members."""

    def __init__(self, status: int, code: str, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.extra = extra
