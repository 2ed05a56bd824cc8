"""A validator whose claims, challenges and CVMs are twins in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_house import TOML, House, new_commit


@pytest.fixture
def house(tmp_path: Path) -> House:
    """A validator with one published challenge."""
    made = House(tmp_path)
    made.publish(new_commit(tmp_path, TOML))
    return made
