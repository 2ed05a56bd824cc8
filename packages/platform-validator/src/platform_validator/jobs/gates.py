"""The claim gates of all challenges, and what the end of a job says to its challenge's."""

from __future__ import annotations

from platform_protocol.ids import ChallengeId
from platform_validator.jobs.ending import Ending
from platform_validator.jobs.gate import ClaimGate
from platform_validator.store.records import JobOutcome


class ClaimGates:
    """One gate a challenge, open at first. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._gates: dict[ChallengeId, ClaimGate] = {}

    def admits(self, challenge_id: ChallengeId, now: float) -> bool:
        """Whether a job of this challenge may be claimed now."""
        return self._gate(challenge_id).admits(now)

    def claimed(self, challenge_id: ChallengeId) -> None:
        """A job of it was let through."""
        self._gates[challenge_id] = self._gate(challenge_id).claimed()

    def withdrawn(self, challenge_id: ChallengeId) -> None:
        """The job that was let through came to nothing, and says nothing."""
        self._gates[challenge_id] = self._gate(challenge_id).withdrawn()

    def ended(self, challenge_id: ChallengeId, ending: Ending, now: float) -> None:
        """A job of it ended so."""
        gate = self._gate(challenge_id)
        match ending.outcome:
            case JobOutcome.SUCCEEDED | JobOutcome.FAILED | JobOutcome.TIMEOUT:
                gate = gate.succeeded()
            case JobOutcome.INFRA_ERROR:
                gate = gate.failed(ending.stage, now)
            case _:
                gate = gate.withdrawn()
        self._gates[challenge_id] = gate

    def closed(self, now: float) -> dict[ChallengeId, bool]:
        """Of each challenge whose jobs were claimed: whether its gate is closed now."""
        return {challenge_id: not gate.admits(now) for challenge_id, gate in self._gates.items()}

    def _gate(self, challenge_id: ChallengeId) -> ClaimGate:
        return self._gates.get(challenge_id, ClaimGate())
