"""The product with guards that can be widened, one at a time: for controls, never for an attack.

Each module is the product's own program or library with some attributes replaced; what is replaced does as
the product does unless the file that HOSTILE_WIDEN names holds the guard's name. The product has no switch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "HOSTILE_WIDEN"


def replace_in(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put what `make` makes of an attribute in its place; one that is not there is an error."""
    setattr(owner, name, make(getattr(owner, name)))


def widened(guard: str) -> bool:
    """Whether this guard is the one that is widened now."""
    return _words()[:1] == [guard]


def argument() -> str:
    """What the guard that is widened now was given."""
    return _words()[-1]


def _words() -> list[str]:
    return Path(os.environ[FILE]).read_text().split(" @ ")
