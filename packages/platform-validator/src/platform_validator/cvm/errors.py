"""Every way in which a CVM does not come to be, or is lost."""

from __future__ import annotations

from platform_validator.errors import ValidatorError


class CvmError(ValidatorError):
    """A CVM could not be made, or was lost. It is on its way to destruction when this is raised."""


class NoCapacity(CvmError):
    """The VMM has no room for it: no failure of the job or the challenge."""


class CreateFailed(CvmError):
    """The VMM refused to make it."""


class BootFailed(CvmError):
    """It was made and did not come up; the message has the VMM's or the SDK's reason."""


class BootTimedOut(BootFailed):
    """It did not come up within its deadline."""


class AttestationRefused(CvmError):
    """What it showed does not meet the policy of the level in force."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(f"attestation refused by check {check}: {detail}")
        self.check = check
        self.detail = detail


class AttestationUnavailable(CvmError):
    """It could not be judged: no quote where one is needed, or no collateral. Says nothing about the CVM."""


class SessionRefused(CvmError):
    """The SDK inside answered the handshake or the job with a refusal."""


class SessionLost(CvmError):
    """The session cannot be resumed: the CVM died, rebooted, or stays silent."""
