"""Collateral from a PCCS at a URL: Intel's own service, or a cache of it."""

from __future__ import annotations

import aiohttp

from platform_validator.attestation.quote import CollateralUnavailable, Fetch

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
