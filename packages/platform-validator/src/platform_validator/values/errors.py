"""What can be wrong with dynamic values."""

from __future__ import annotations

from platform_validator.errors import ValidatorError


class ValueRefused(ValidatorError):
    """A request that is answered with an error: `code` is its stable word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class OutsideOfSession(ValidatorError):
    """Bare `get` and `set` belong inside a session, which says whose values they are: use `for_challenge`."""


class ValueKeysUnusable(ValidatorError):
    """The keys that values are sealed under cannot be had; the message says what mends it."""


class ValueUnreadable(ValidatorError):
    """A sealed value does not open: changed, moved from elsewhere, or under a key that is gone."""
