"""Why no image came out. The text of each goes to whoever asked for it."""

from __future__ import annotations

from platform_vmm.errors import VmmError


class ImageNotBuilt(VmmError):
    """The root filesystem could not be made; nothing half-done is left."""


class ToolMissing(ImageNotBuilt):
    """A program of this machine that the build needs is not there; the message names its package."""


class MirrorFailed(ImageNotBuilt):
    """Debian's packages could not be had; the message names the mirrors that were tried."""


class PackageRefused(ImageNotBuilt):
    """What was downloaded is not what was decided on: another hash, or a form that is not taken."""


class NoRoom(ImageNotBuilt):
    """The disk is full, or would be."""


class WheelsFailed(ImageNotBuilt):
    """The SDK's libraries could not be had from the package index."""


class NotReproduced(ImageNotBuilt):
    """The same image was asked for, and another came out or would."""
