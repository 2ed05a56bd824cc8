"""A result as it arrives: read, checked, and in the form that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from platform_api.errors import ApiError, faults_of
from platform_protocol.canonical import NotCanonical, canonical_json, sha256_hex
from platform_protocol.platform_messages import ResultBody, ResultOutcome

MAX_LOGS = 256 * 1024
MAX_ERROR = 4 * 1024


@dataclass(frozen=True, slots=True)
class AcceptedResult:
    """A readable result: `sha256` is of the RFC 8785 form of the whole body, `kept` has no lease token."""

    body: ResultBody
    sha256: str
    kept: str

    @property
    def succeeded(self) -> bool:
        """Whether the submission ran to a score."""
        return self.body.outcome is ResultOutcome.SUCCEEDED

    @classmethod
    def read(cls, value: Any) -> AcceptedResult:
        """Check a body: every key required, I-JSON, finite numbers, sizes, 0.0 where it did not succeed.

        Raises:
            ApiError: 422 `invalid_result`, naming what was expected.
        """
        try:
            body = ResultBody.model_validate(value)
            digest = sha256_hex(canonical_json(value))
            kept = canonical_json({key: item for key, item in value.items() if key != "lease_token"})
        except ValidationError as error:
            raise _refused(faults_of(error)) from error
        except NotCanonical as error:
            raise _refused(str(error)) from error
        accepted = cls(body, digest, kept.decode())
        if not accepted.succeeded and body.score != 0.0:
            raise _refused(f"score: expected exactly 0.0 with outcome {body.outcome}, got {body.score}")
        if sum(len(line.encode()) for line in body.logs) > MAX_LOGS:
            raise _refused(f"logs: expected at most {MAX_LOGS} bytes in all")
        if body.error is not None and len(body.error.encode()) > MAX_ERROR:
            raise _refused(f"error: expected at most {MAX_ERROR} bytes")
        return accepted


def _refused(detail: str) -> ApiError:
    return ApiError(422, "invalid_result", detail)
