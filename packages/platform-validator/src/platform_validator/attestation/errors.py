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
    """It could not be judged: no quote where one is needed, or no collateral. Says nothing about the CVM.

    `passing`: it may be judged a little later (the collateral service does not answer, the guest agent is not
    up yet), so that a CVM that has just booted is asked again until its deadline.
    """

    def __init__(self, detail: str, *, passing: bool = False) -> None:
        super().__init__(detail)
        self.passing = passing
