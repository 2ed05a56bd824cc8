"""Every way in which a CVM does not come to be, or is lost."""

from __future__ import annotations

from platform_validator.attestation.errors import AttestationRefused, AttestationUnavailable
from platform_validator.errors import CvmError

__all__ = [
    "AttestationRefused",
    "AttestationUnavailable",
    "BootFailed",
    "BootTimedOut",
    "CreateFailed",
    "CvmError",
    "NoCapacity",
    "SessionLost",
    "SessionRefused",
    "is_port_conflict",
]


_PORT_WORDS = ("conflict", "in use", "bind")
_FORWARDING = "host forwarding rule"


class NoCapacity(CvmError):
    """The VMM has no room for it: no failure of the job or the challenge."""


class CreateFailed(CvmError):
    """The VMM refused to make it."""


class BootFailed(CvmError):
    """It was made and did not come up; the message has the VMM's or the SDK's reason."""


class BootTimedOut(BootFailed):
    """It did not come up within its deadline."""


class SessionRefused(CvmError):
    """The SDK inside answered the handshake or the job with a refusal."""


class SessionLost(CvmError):
    """The session cannot be resumed: the CVM died, rebooted, or stays silent."""


def is_port_conflict(error: Exception) -> bool:
    """By the words of QEMU and of dstack: no version says it in another way."""
    text = str(error).lower()
    return _FORWARDING in text or ("port" in text and any(word in text for word in _PORT_WORDS))
