"""Collateral of the local VMM's own simulated quotes, below its `/pccs`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from platform_validator.attestation.collateral import CollateralUnavailable, Fetch
from platform_validator.cvm.vmm import VmmError


def from_vmm(collateral: Callable[[str], Awaitable[tuple[bytes, Mapping[str, str]]]]) -> Fetch:
    """The local VMM's, for its simulated quotes."""

    async def fetch(path: str) -> tuple[bytes, dict[str, str]]:
        try:
            body, headers = await collateral(path)
        except VmmError as error:
            raise CollateralUnavailable(str(error)) from error
        return body, dict(headers)

    return fetch
