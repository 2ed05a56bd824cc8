"""Downloads the challenge's bundle from the validator, over any number of broken connections."""

from __future__ import annotations

import http.client
import random
import re
import time
from urllib.parse import urlsplit

from platform_challenge_sdk.errors import BootFailed
from platform_protocol.bundle import MAX_BUNDLE_BYTES
from platform_protocol.canonical import sha256_hex
from platform_protocol.tokens import bundle_authorization
from platform_protocol.user_config import UserConfig

DEADLINE = 240.0
_TIMEOUT = 20.0
_CHUNK = 1024 * 1024
_FIRST_PAUSE, _MAX_PAUSE = 0.1, 5.0
_REFUSED = {400, 401, 403, 404, 410}
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def fetch_bundle(config: UserConfig, sha256: str, *, deadline: float = DEADLINE) -> bytes:
    """Download the bundle, going on where a connection broke, and check its hash. Blocks.

    Raises:
        BootFailed: Refused, too large, not complete in `deadline` seconds, or another hash.
    """
    end = time.monotonic() + deadline
    data = bytearray()
    pause = _FIRST_PAUSE
    while True:
        have = len(data)
        try:
            if _fetch_once(config, sha256, data, end):
                break
            last = "the connection ended early"
        except (OSError, ValueError, http.client.HTTPException) as error:
            last = f"{type(error).__name__}: {error}"
        pause = _FIRST_PAUSE if len(data) > have else min(_MAX_PAUSE, 2 * pause)
        if time.monotonic() + pause >= end:
            raise BootFailed(f"the bundle did not arrive from {config.validator_base_url}: {last}")
        time.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
    actual = sha256_hex(bytes(data))
    if actual != sha256:
        raise BootFailed(f"expected a bundle with SHA-256 {sha256}, received {actual}")
    return bytes(data)


def _fetch_once(config: UserConfig, sha256: str, data: bytearray, end: float) -> bool:
    """Add what comes to `data`; whether it is whole."""
    url = urlsplit(config.validator_base_url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=_TIMEOUT)
    try:
        headers = {"Authorization": bundle_authorization(config.secret, config.vm, sha256)}
        if data:
            headers["Range"] = f"bytes={len(data)}-"
        connection.request("GET", f"{url.path.rstrip('/')}/bundles/{sha256}", headers=headers)
        response = connection.getresponse()
        if response.status in _REFUSED:
            raise BootFailed(f"the validator refused the bundle: HTTP {response.status}")
        total = _total(response, data)
        if total > MAX_BUNDLE_BYTES:
            raise BootFailed(f"expected a bundle of at most {MAX_BUNDLE_BYTES} bytes, offered {total}")
        while len(data) < total and time.monotonic() < end and (chunk := response.read1(_CHUNK)):
            data += chunk
        return len(data) == total
    finally:
        connection.close()


def _total(response: http.client.HTTPResponse, data: bytearray) -> int:
    """The bundle's size, with `data` cut to where this response begins."""
    if response.status == http.client.PARTIAL_CONTENT:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) > len(data):
            data.clear()
            raise OSError(f"a range that was not asked for: {response.headers.get('Content-Range')}")
        del data[int(found[1]) :]
        return int(found[3])
    data.clear()
    if response.status != http.client.OK:
        raise OSError(f"HTTP {response.status}")
    return int(response.headers["Content-Length"] or "missing")
