"""Why a CVM is not believed."""

from __future__ import annotations

from platform_validator.errors import CvmError


class AttestationRefused(CvmError):
    """What it showed does not meet the policy of the level in force; `check` names what failed."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(f"attestation refused by check {check}: {detail}")
        self.check = check
        self.detail = detail


class AttestationUnavailable(CvmError):
    """It could not be judged: no quote where one is needed, or no collateral. Says nothing about the CVM."""
