"""One kind of tampering, and the one answer that it must get.

`refused CHECK`: the CVM is not believed, and CHECK says why. `unavailable PART`: the collateral service gave
something that cannot be used, which says nothing about the CVM; it is not believed either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.attestation import forge
from tests.attestation.evidence import Evidence, World

Make = Callable[[World], Evidence]


@dataclass(frozen=True, slots=True)
class Case:
    """One kind: what is done, the answer it must get, and how it is made."""

    area: str
    name: str
    answer: str
    make: Make

    def __str__(self) -> str:
        return f"{self.area}: {self.name}"


def td(area: str, name: str, check: str, **fields: Any) -> Case:
    """A TD that reports something else, under signatures that hold."""
    return Case(area, name, f"refused {check}", lambda world: world.evidence(td=fields))


def signed(area: str, name: str, check: str, **parts: Any) -> Case:
    """A quote that is signed in another way."""
    return Case(area, name, f"refused {check}", lambda world: world.evidence(parts=forge.QuoteParts(**parts)))
