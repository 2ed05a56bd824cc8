"""What jobs tell whoever measures: a small port, so that telemetry may be anything."""

from __future__ import annotations

from typing import Protocol

from platform_protocol.ids import ChallengeId
from platform_validator.jobs.capacity import NoCapacity
from platform_validator.store.records import JobOutcome, Stage


class JobMetrics(Protocol):
    """Every method returns at once and raises nothing."""

    def stage_took(self, stage: Stage, seconds: float) -> None:
        """A job left a stage."""

    def job_ended(self, challenge_id: ChallengeId, outcome: JobOutcome) -> None:
        """A job ended here."""

    def claim_answered(self, answer: str) -> None:
        """`granted`, or the code of the refusal, or `unanswered`."""

    def pass_made(self, source: str) -> None:
        """The loop made a pass, woken by `push`, `poll` or `local`."""

    def passed_over(self, reason: NoCapacity, jobs: int) -> None:
        """A pending job was not claimed."""

    def slots(self, used: int, total: int) -> None:
        """Job slots now."""

    def outbox(self, depth: int, oldest_s: float) -> None:
        """Undelivered results now."""

    def delivery(self, answer: str) -> None:
        """`accepted`, a refusal's code, or `unanswered`."""

    def claim_dispatched(self, source: str) -> None:
        """A claim was granted for a pass that `push`, `poll` or `local` woke."""

    def queued(self, seconds: float) -> None:
        """How long a job had been pending when it was claimed here."""

    def recovered(self, fate: str, jobs: int) -> None:
        """At start so many open jobs were found of which this becomes."""


class Unmeasured:
    """Measures nothing."""

    def stage_took(self, stage: Stage, seconds: float) -> None:
        """Nothing."""

    def job_ended(self, challenge_id: ChallengeId, outcome: JobOutcome) -> None:
        """Nothing."""

    def claim_answered(self, answer: str) -> None:
        """Nothing."""

    def pass_made(self, source: str) -> None:
        """Nothing."""

    def passed_over(self, reason: NoCapacity, jobs: int) -> None:
        """Nothing."""

    def slots(self, used: int, total: int) -> None:
        """Nothing."""

    def outbox(self, depth: int, oldest_s: float) -> None:
        """Nothing."""

    def delivery(self, answer: str) -> None:
        """Nothing."""

    def claim_dispatched(self, source: str) -> None:
        """Nothing."""

    def queued(self, seconds: float) -> None:
        """Nothing."""

    def recovered(self, fate: str, jobs: int) -> None:
        """Nothing."""
