"""What a refusal by attestation stands on besides the commit: the policy, and the images that the VMM has."""

from __future__ import annotations

from collections.abc import Callable

from platform_validator.challenges.room import Images
from platform_validator.cvm.vmm import VmmError


class Standing:
    """Compared as text: while it stays the same, what was refused would be refused again.

    Args:
        policy: A fingerprint of the attestation policy in force.
        vmm: Lists the images; while it does not answer, they count as unchanged.
    """

    def __init__(self, policy: Callable[[], str], vmm: Images) -> None:
        self._policy = policy
        self._vmm = vmm
        self._images = ""

    async def now(self) -> str:
        """As it is now."""
        try:
            listed = (await self._vmm.facts()).images
        except VmmError:
            listed = None
        if listed is not None:
            self._images = repr(sorted((one.name, one.level.value, *one.runtimes.values()) for one in listed))
        return f"{self._policy()} {self._images}"
