"""Values in memory: what a validator answers to a challenge's requests, for runs without one."""

from __future__ import annotations

from typing import Any

from platform_protocol.session.messages import (
    GuestMessage,
    JobError,
    ValuesCas,
    ValuesDelete,
    ValuesGet,
    ValuesIncrement,
    ValuesList,
    ValuesResult,
    ValuesSet,
)


class MemoryValues:
    """`entries`: key to (value, version)."""

    def __init__(self, entries: dict[str, tuple[Any, int]] | None = None) -> None:
        self.entries = entries if entries is not None else {}

    def answer(self, request: GuestMessage) -> ValuesResult | None:
        """The answer to a values request; None to anything else."""
        match request:
            case ValuesGet():
                value, version = self.entries.get(request.key, (None, None))
                return ValuesResult(request_id=request.request_id, value=value, version=version)
            case ValuesList():
                keys = sorted(key for key in self.entries if key.startswith(request.prefix))
                return ValuesResult(request_id=request.request_id, keys=keys[: request.limit])
            case ValuesDelete():
                self.entries.pop(request.key, None)
                return ValuesResult(request_id=request.request_id)
            case ValuesSet() | ValuesIncrement() | ValuesCas():
                return self._change(request)
            case _:
                return None

    def _change(self, request: ValuesSet | ValuesIncrement | ValuesCas) -> ValuesResult:
        request_id, key = request.request_id, request.key
        there, version = self.entries.get(key, (0, 0))
        if isinstance(request, ValuesIncrement):
            if isinstance(there, bool) or not isinstance(there, int | float):
                return _refused(request_id, "not_a_number", f"{key!r} holds no number")
            return self._write(request_id, key, there + request.by)
        if isinstance(request, ValuesCas) and version != request.expected_version:
            return _refused(request_id, "version_conflict", f"{key!r} is at version {version}")
        return self._write(request_id, key, request.value)

    def _write(self, request_id: str, key: str, value: Any) -> ValuesResult:
        version = self.entries.get(key, (None, 0))[1] + 1
        self.entries[key] = value, version
        return ValuesResult(request_id=request_id, value=value, version=version)


def _refused(request_id: str, code: str, message: str) -> ValuesResult:
    return ValuesResult(request_id=request_id, error=JobError(code=code, message=message))
