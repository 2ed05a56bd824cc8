"""What the configuration calls a VMM host; journal, quota and operator speak of it by this name."""

from __future__ import annotations

from typing import NewType

HostName = NewType("HostName", str)

DEFAULT_HOST = HostName("default")
"""The only host of a configuration that lists none."""
