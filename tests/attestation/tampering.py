"""Every kind of tampering."""

from __future__ import annotations

from tests.attestation.case import Case
from tests.attestation.tampered_collateral import collateral
from tests.attestation.tampered_guests import guests
from tests.attestation.tampered_quotes import quotes


def cases() -> list[Case]:
    """All of them, in the order in which they are printed."""
    return [*quotes(), *collateral(), *guests()]
