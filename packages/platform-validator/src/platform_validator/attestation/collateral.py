"""Where collateral comes from: a PCCS at a URL, or the local VMM's own below `/pccs`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import aiohttp

from platform_validator.attestation.quote import CollateralUnavailable, Fetch
from platform_validator.cvm.vmm import VmmError

_TIMEOUT = 20.0
_MAX = 4 * 1024 * 1024
_OK = 200


def from_pccs(url: str) -> Fetch:
    """A PCCS, or Intel's own service."""

    async def fetch(path: str) -> tuple[bytes, dict[str, str]]:
        try:
            timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
            async with (
                aiohttp.ClientSession(timeout=timeout) as http,
                http.get(url + path, allow_redirects=False) as response,
            ):
                body = await response.content.read(_MAX)
                if response.status != _OK:
                    raise CollateralUnavailable(f"GET {url}{path}: HTTP {response.status}")
                return body, dict(response.headers)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CollateralUnavailable(f"no answer from the collateral service {url}: {error}") from error

    return fetch


def from_vmm(collateral: Callable[[str], Awaitable[tuple[bytes, Mapping[str, str]]]]) -> Fetch:
    """The local VMM's, for its simulated quotes."""

    async def fetch(path: str) -> tuple[bytes, dict[str, str]]:
        try:
            body, headers = await collateral(path)
        except VmmError as error:
            raise CollateralUnavailable(str(error)) from error
        return body, dict(headers)

    return fetch
