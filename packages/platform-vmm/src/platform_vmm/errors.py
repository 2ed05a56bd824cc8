"""The root of every error that the VMM raises on purpose."""

from __future__ import annotations


class VmmError(Exception):
    """What was asked cannot be done; the text goes to the caller as `{"error": …}` with 400."""


class VmNotFound(VmmError):
    """No VM of that id."""


class ComposeUnsupported(VmmError):
    """The compose file asks for something outside the documented subset; the message names the key."""


class ImageUnknown(VmmError):
    """No image of that name in the table."""


class SandboxFailed(VmmError):
    """The sandbox could not be made; the message says at which step."""


class StateInUse(VmmError):
    """Another VMM holds the state directory."""


class RecordUnreadable(VmmError):
    """A VM's record was never finished: its CreateVm was never answered."""
