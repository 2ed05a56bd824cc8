"""Why the pending jobs of one pass were not claimed: what `validator status` shows, and the metrics count."""

from __future__ import annotations

from dataclasses import dataclass

from platform_validator.jobs.capacity import Capacity, NoCapacity

_ORDER = {reason: number for number, reason in enumerate(NoCapacity)}


@dataclass(frozen=True, slots=True)
class Waiting:
    """Pending jobs that were passed over for one reason.

    Attributes:
        reason: Which.
        jobs: How many; None: they were not even listed, because none could have been claimed.
        detail: The figures of the first of them: what it wants, what is free.
    """

    reason: NoCapacity
    jobs: int | None
    detail: str = ""


class Tally:
    """Counts during one pass."""

    def __init__(self) -> None:
        self._jobs: dict[NoCapacity, int] = {}
        self._details: dict[NoCapacity, str] = {}

    def add(self, answer: Capacity) -> None:
        """A job was not claimed; one that was lost on the way to its share is not counted."""
        if answer.refusal is not None:
            self._jobs[answer.refusal] = self._jobs.get(answer.refusal, 0) + 1
            self._details.setdefault(answer.refusal, answer.detail)

    def rows(self) -> tuple[Waiting, ...]:
        """One for each reason, in the order in which they are looked for."""
        return tuple(
            Waiting(reason, self._jobs[reason], self._details[reason])
            for reason in sorted(self._jobs, key=_ORDER.__getitem__)
        )
