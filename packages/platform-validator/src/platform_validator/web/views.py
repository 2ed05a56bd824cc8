"""What the web and the command line read of the daemon."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Health:
    """`phase`: starting, running, draining or stopping; `reasons` of what fails, for operators only."""

    phase: str
    components: dict[str, str]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The status word: ok or degraded while running, else the phase."""
        if self.phase != "running":
            return self.phase
        return "ok" if all(word == "ok" for word in self.components.values()) else "degraded"

    @property
    def code(self) -> int:
        """The HTTP status of /health."""
        return 200 if self.phase == "running" else 503


class Views(Protocol):
    """Read at once, without I/O but for the journal's jobs."""

    def health(self) -> Health:
        """The daemon's health."""

    def metrics(self) -> tuple[bytes, str] | None:
        """(exposition, content type), or None when metrics are off."""

    def bundle(self, sha256: str, authorization: str) -> Path | None:
        """The bundle's file, for a CVM that may have it now."""

    def status(self) -> dict[str, Any]:
        """Everything in short."""

    async def jobs(self, limit: int) -> list[dict[str, Any]]:
        """Newest claims first."""

    def cvms(self) -> list[dict[str, Any]]:
        """Every CVM that is not gone."""

    def hosts(self) -> list[dict[str, Any]]:
        """Every VMM host: its state, why, and what is used of it."""

    def challenges(self) -> list[dict[str, Any]]:
        """Every challenge."""

    async def challenge(self, named: str) -> dict[str, Any] | None:
        """One challenge, by its id or name, with its history, newest first; None: there is none."""
