"""The arena with the SDK's reader of archives replaced by the standard library's, without its filter."""

from __future__ import annotations

import importlib
import tarfile
from pathlib import Path
from typing import Any


def unpack(archive: Path, target: Path, single_name: str = "submission") -> None:
    """As one would do it in a hurry."""
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="fully_trusted")  # noqa: S202 - what the control is about


# Untyped on purpose: the attribute is replaced.
job: Any = importlib.import_module("platform_challenge_sdk.job")
job.unpack = unpack
importlib.import_module("arena")
