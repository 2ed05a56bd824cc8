"""The claim gate: after three infrastructure errors in a row at one stage, stop claiming for a while."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from platform_validator.store.records import Stage

ERRORS_TO_CLOSE = 3
FIRST_PAUSE = timedelta(seconds=30)
LONGEST_PAUSE = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class ClaimGate:
    """One challenge's gate, as a value: each event gives the next gate. Times are monotonic seconds.

    Open, it lets every job pass. Closed, none until `closed_until`; then exactly one probe, whose end
    decides: success opens, another infrastructure error doubles the pause.
    """

    stage: Stage | None = None
    errors: int = 0
    pauses: int = 0
    closed_until: float | None = None
    probing: bool = False

    def admits(self, now: float) -> bool:
        """Whether a job may be claimed now."""
        if self.closed_until is None:
            return True
        return now >= self.closed_until and not self.probing

    def claimed(self) -> ClaimGate:
        """A job was let through; when the gate was closed it is the probe."""
        if self.closed_until is None:
            return self
        return ClaimGate(self.stage, self.errors, self.pauses, self.closed_until, probing=True)

    def withdrawn(self) -> ClaimGate:
        """The job ended without saying anything about the infrastructure (409, cancelled, drained)."""
        return ClaimGate(self.stage, self.errors, self.pauses, self.closed_until)

    def succeeded(self) -> ClaimGate:
        """A job came through, whatever its score."""
        return ClaimGate()

    def failed(self, stage: Stage, now: float) -> ClaimGate:
        """A job ended as infra_error at a stage."""
        errors = self.errors + 1 if stage is self.stage else 1
        if errors < ERRORS_TO_CLOSE and self.closed_until is None:
            return ClaimGate(stage, errors)
        pause = min(FIRST_PAUSE * 2 ** min(self.pauses, 16), LONGEST_PAUSE)
        return ClaimGate(stage, errors, self.pauses + 1, now + pause.total_seconds())
