"""What a VMM means by a refusal, and by the last words of a VM's process.

Texts differ between versions (one line, or Debug form with `Caused by`), so only substrings are looked at.
"""

from __future__ import annotations

from platform_validator.cvm.vmm import VmmAtCapacity, VmmRefused, VmNotFound

_CAPACITY = (
    "no cid available",
    "cid pool",
    "not enough",
    "insufficient",
    "out of memory",
    "cannot allocate memory",
    "cannot set up guest memory",
    "no space left",
    "gpu is not available",
    "gpu is in use",
    "device or resource busy",
    "no vcpu",
)
_MISSING = ("vm not found", "failed to remove vm directory", "no such vm")


def refusal(method: str, text: str) -> VmmRefused:
    """The error for the text of a 400."""
    lowered = text.lower()
    message = f"{method}: {text[:1000] or 'refused without a reason'}"
    if any(word in lowered for word in _MISSING):
        return VmNotFound(message)
    if is_shortage(lowered):
        return VmmAtCapacity(message)
    return VmmRefused(message)


def is_shortage(text: str) -> bool:
    """Whether the host lacked something: memory, a GPU, a CID, disk. A host port is told otherwise."""
    lowered = text.lower()
    return any(word in lowered for word in _CAPACITY)
