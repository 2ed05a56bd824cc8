"""The root of every error that the validator raises on purpose."""

from __future__ import annotations


class ValidatorError(Exception):
    """Something the validator names: its message says what was expected, what came and what to do."""


class CvmError(ValidatorError):
    """A CVM could not be made, or was lost. It is on its way to destruction when this is raised."""
