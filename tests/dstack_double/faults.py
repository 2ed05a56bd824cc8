"""What a test has the double do wrong: one fault is taken by one call of its method."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """A call that goes wrong.

    Attributes:
        effects: How often the call is really done: 0, 1, or 2 (a repeated request).
        after: Seconds before it is done, when nobody waits for the answer any more.
        silent: No answer ever comes; the connection stays open.
        cut: The connection is closed without an answer.
        status: Answered with this HTTP status and `body` in place of the real answer.
        error: Refused, 400, with this text in the version's form.
        body: See `status`; with 200 an answer that is not true.
    """

    effects: int = 0
    after: float = 0.0
    silent: bool = False
    cut: bool = False
    status: int | None = None
    error: str | None = None
    body: str = ""


class Faults:
    """Faults by method, in order."""

    def __init__(self) -> None:
        self._queued: dict[str, deque[Fault]] = {}
        self._always: dict[str, Fault] = {}

    def add(self, method: str, fault: Fault, *, times: int = 1) -> None:
        """The next `times` calls."""
        self._queued.setdefault(method, deque()).extend([fault] * times)

    def always(self, method: str, fault: Fault) -> None:
        """Every call until `heal`."""
        self._always[method] = fault

    def heal(self) -> None:
        """No fault any more."""
        self._queued.clear()
        self._always.clear()

    def take(self, method: str) -> Fault | None:
        """The one for this call."""
        queued = self._queued.get(method)
        return queued.popleft() if queued else self._always.get(method)
