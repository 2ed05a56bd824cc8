"""What challenges and jobs need of the CVM side: a fleet that boots, and a quota that reserves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from platform_protocol.ids import ClaimId, VmName
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Reservation
from platform_validator.cvm.session import CvmSession
from platform_validator.store.records import Purpose


class Guest(Protocol):
    """A booted, attested and configured CVM."""

    @property
    def name(self) -> VmName:
        """Its name."""

    @property
    def plan(self) -> CvmPlan:
        """What it was booted from."""

    @property
    def attestation(self) -> AttestationKind:
        """What proved it."""

    @property
    def isolation_level(self) -> IsolationLevel:
        """The level it was made at."""

    @property
    def session(self) -> CvmSession:
        """The attested session with the SDK inside."""


class CvmFleet(Protocol):
    """Boots and destroys CVMs."""

    async def boot(
        self,
        plan: CvmPlan,
        *,
        purpose: Purpose,
        reservation: Reservation,
        claim_id: ClaimId | None,
        on_stage: Callable[[str], None],
    ) -> Guest:
        """Boot one; the reservation belongs to it from the call on. Raises what `cvm.errors` names."""

    def destroy(self, name: VmName) -> None:
        """Have it destroyed; never waits."""
