"""What challenges and jobs need of the CVM side: a fleet that boots, and a quota that reserves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from platform_protocol.ids import ClaimId, JobId, VmName
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Reservation
from platform_validator.cvm.session import GuestResult, JobOrder
from platform_validator.cvm.usage import VmUsage
from platform_validator.cvm.vmm import VmmFacts
from platform_validator.store.records import Purpose


class Images(Protocol):
    """What challenges ask of the VMM hosts."""

    async def facts(self) -> VmmFacts:
        """What they offer together. Raises VmmError."""


class GuestSession(Protocol):
    """What a job needs of the attested session with the SDK inside."""

    async def execute(
        self,
        order: JobOrder,
        submission: Path | None,
        *,
        on_started: Callable[[bool], None],
        on_progress: Callable[[float, str], None],
        on_log: Callable[[str, str], None],
    ) -> GuestResult:
        """Run a job, or go on with it.

        `on_started` marks the SDK's acknowledgement, and says whether it had the job before this call.

        Raises:
            SessionLost: Or SessionRefused.
        """

    async def cancel(self, job_id: JobId, reason: str) -> None:
        """Have the SDK end the job."""

    async def confirm(self) -> None:
        """Return once the SDK has shown that it lives. Raises SessionLost when it does not."""

    async def acknowledge(self, result: GuestResult) -> None:
        """Tell the SDK that the result is durable here."""

    async def lost(self) -> Exception:
        """Wait until the session can go on no more; why."""


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
    def os_image(self) -> str | None:
        """How its OS image came to be trusted (JSON), for its receipts; None where no quote was asked for."""

    @property
    def isolation_level(self) -> IsolationLevel:
        """The level it was made at."""

    @property
    def session(self) -> GuestSession:
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

    async def adopt(self, name: VmName, plan: CvmPlan) -> Guest:
        """Take over one that an earlier process left running. Raises what `cvm.errors` names."""

    async def trouble(self, name: VmName) -> str | None:
        """What is wrong with the host that it is on: asked now. None: nothing."""

    async def usage(self, name: VmName) -> VmUsage | None:
        """What it used so far, asked now, for a moment at most. None: not known."""

    def assigned(self, name: VmName) -> None:
        """A ready one is a job's now, as the journal says already."""

    def destroy(self, name: VmName) -> None:
        """Have it destroyed; never waits."""
