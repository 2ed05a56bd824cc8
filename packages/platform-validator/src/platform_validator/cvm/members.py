"""The CVMs that a fleet holds, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from platform_protocol.ids import ChallengeId, VmId, VmName
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_validator.attestation.quote import VerifiedQuote
from platform_validator.cvm.destroyer import Doomed
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Use
from platform_validator.cvm.sessions import Session
from platform_validator.cvm.usage import VmUsage
from platform_validator.egress.gate import EgressUse
from platform_validator.host_name import DEFAULT_HOST, HostName
from platform_validator.store.records import Purpose, VmPhase, VmRecord


@dataclass(frozen=True, slots=True)
class Cvm:
    """A booted, attested and configured CVM. `quote` None: it showed none.

    `os_image`: how its OS image came to be trusted (JSON), None where no quote was asked for.
    """

    name: VmName
    vm_id: VmId
    plan: CvmPlan
    attestation: AttestationKind
    isolation_level: IsolationLevel
    session: Session
    quote: VerifiedQuote | None = None
    os_image: str | None = None

    @property
    def compose_hash(self) -> str:
        """SHA-256 of the app-compose bytes that it was made of, hex."""
        return self.plan.compose_hash


@dataclass(frozen=True, slots=True)
class CvmView:
    """A CVM as status, CLI and pages show it."""

    name: VmName
    challenge_id: ChallengeId
    purpose: Purpose
    stage: str
    attestation: str | None
    since: datetime
    host: HostName = DEFAULT_HOST
    tries: int = 0
    last_error: str | None = None
    usage: VmUsage | None = None
    egress: EgressUse | None = None


@dataclass(slots=True)
class Member:
    """What the fleet holds of a CVM until it is gone. `secret` None: it is from before a restart.

    `record` is what was intended, or read at start; `session` and `vm_id` come together, once it has booted.
    """

    record: VmRecord
    plan: CvmPlan | None = None
    secret: bytes | None = field(default=None, repr=False)
    stage: str = "creating"
    session: Session | None = None
    vm_id: VmId | None = None
    attestation: AttestationKind | None = None

    def view(self, end: Doomed | None, usage: VmUsage | None, egress: EgressUse | None) -> CvmView:
        """As it is shown; `end`: it is on its way out; `egress`: None where it may reach nothing."""
        return CvmView(
            self.record.name,
            self.record.challenge_id,
            self.record.purpose,
            self.stage,
            self.attestation.value if self.attestation else self.record.attestation,
            self.record.intended_at,
            self.record.host,
            end.tries if end else 0,
            end.last_error if end else None,
            usage,
            egress,
        )


def use_of(record: VmRecord) -> Use:
    """A job's; or ready, waiting for one; else its challenge's: being proved, or shared."""
    if record.purpose is Purpose.JOB or record.claim_id is not None:
        return Use.JOB
    waits = record.purpose is Purpose.READY and record.phase is VmPhase.READY
    return Use.READY if waits else Use.CHALLENGE
