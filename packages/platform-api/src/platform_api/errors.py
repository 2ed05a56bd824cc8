"""What the API answers when it says no: problem details with a stable code."""

from __future__ import annotations

from typing import Any, Protocol


class ApiError(Exception):
    """An RFC 9457 answer: HTTP status, `code` (a stable snake_case word), a sentence, and extra members."""

    def __init__(self, status: int, code: str, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.extra = extra


class _Faults(Protocol):
    def errors(self) -> Any: ...


def faults_of(error: _Faults) -> str:
    """The first ten faults of a validation as one sentence: where, and what was expected."""
    found = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:10]]
    return "; ".join(found)
