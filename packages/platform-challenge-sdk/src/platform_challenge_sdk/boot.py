"""`platform-boot`: fetches the challenge's bundle, checks it, unpacks it, imports it, and serves it.

On failure it serves `/sdk/health` with the reason until the boot deadline, so that an import error is
visible on the validator's side.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import importlib
import os
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.challenge import challenge as the_challenge
from platform_challenge_sdk.errors import BootFailed, SdkError
from platform_challenge_sdk.serve import PORT, ChallengeServer, Health, end_on_signals
from platform_protocol.bundle import BundleInvalid, unpack
from platform_protocol.canonical import sha256_hex
from platform_protocol.compose import USER_CONFIG_PATH
from platform_protocol.spec import ChallengeSpec, SpecInvalid, parse_platform_toml
from platform_protocol.tokens import bundle_authorization
from platform_protocol.user_config import UserConfig

BOOT_DEADLINE = 300.0
_FETCH_DEADLINE = 240.0
_FETCH_TIMEOUT = 20.0
_CHUNK = 1024 * 1024
_MAX_BUNDLE = 1024 * 1024 * 1024
_booting = False


@dataclass(frozen=True, slots=True)
class Boot:
    """What platform-boot is told: user_config, and the measured environment of app-compose."""

    config: UserConfig
    sha256: str
    entry: str


def booting() -> bool:
    """Whether platform-boot is importing the challenge."""
    return _booting


def read_boot() -> Boot:
    """Read user_config (PLATFORM_USER_CONFIG overrides its path) and the environment.

    Raises:
        BootFailed: Something is missing or malformed.
    """
    path = Path(os.environ.get("PLATFORM_USER_CONFIG", USER_CONFIG_PATH))
    try:
        config = UserConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BootFailed(f"user_config cannot be read at {path}: {error.strerror}") from error
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, fault["loc"])) for fault in error.errors())
        raise BootFailed(f"user_config has wrong or missing keys: {fields}") from error
    sha256, entry = os.environ.get("CHALLENGE_SHA256", ""), os.environ.get("CHALLENGE_ENTRY", "challenge")
    if len(sha256) != hashlib.sha256().digest_size * 2:
        raise BootFailed("CHALLENGE_SHA256: expected 64 hex digits in the environment")
    return Boot(config, sha256, entry)


def fetch_bundle(boot: Boot) -> bytes:
    """Download the bundle, going on where a connection broke, and check its hash. Blocks.

    Raises:
        BootFailed: Refused, not complete in 240 s, or another hash.
    """
    data = bytearray()
    deadline = time.monotonic() + _FETCH_DEADLINE
    last = "no try yet"
    while time.monotonic() < deadline:
        try:
            if _fetch_once(boot, data):
                break
        except (OSError, http.client.HTTPException) as error:
            last = f"{type(error).__name__}: {error}"
            time.sleep(0.5)
    else:
        raise BootFailed(f"the bundle did not arrive from {boot.config.validator_base_url}: {last}")
    actual = sha256_hex(bytes(data))
    if actual != boot.sha256:
        raise BootFailed(f"expected a bundle with SHA-256 {boot.sha256}, received {actual}")
    return bytes(data)


def _fetch_once(boot: Boot, data: bytearray) -> bool:
    url = urlsplit(boot.config.validator_base_url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=_FETCH_TIMEOUT)
    try:
        headers = {"Authorization": bundle_authorization(boot.config.secret, boot.config.vm, boot.sha256)}
        if data:
            headers["Range"] = f"bytes={len(data)}-"
        connection.request("GET", f"{url.path.rstrip('/')}/bundles/{boot.sha256}", headers=headers)
        response = connection.getresponse()
        if response.status in (401, 403, 404):
            raise BootFailed(f"the validator refused the bundle: HTTP {response.status}")
        if response.status not in (200, 206):
            raise OSError(f"HTTP {response.status}")
        if response.status == http.client.OK:
            data.clear()
        expected = len(data) + int(response.headers.get("Content-Length", "0"))
        if expected > _MAX_BUNDLE:
            raise BootFailed(f"expected a bundle of at most {_MAX_BUNDLE} bytes, offered {expected}")
        while chunk := response.read(_CHUNK):
            data += chunk
        return len(data) == expected
    finally:
        connection.close()


def unpack_bundle(data: bytes, target: Path) -> ChallengeSpec:
    """Write the tree and read its platform.toml.

    Raises:
        BootFailed: Not a bundle, or no valid platform.toml in it.
    """
    try:
        for entry in unpack(data):
            path = target / entry.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry.link is not None:
                path.symlink_to(entry.link)
            else:
                path.write_bytes(entry.data)
                path.chmod(0o755 if entry.executable else 0o644)
        return parse_platform_toml((target / "platform.toml").read_bytes())
    except BundleInvalid as error:
        raise BootFailed(f"the bundle cannot be unpacked: {error}") from error
    except SpecInvalid as error:
        raise BootFailed(str(error)) from error
    except OSError as error:
        raise BootFailed(f"the bundle cannot be unpacked: {error}") from error


def import_challenge(target: Path, entry: str) -> None:
    """Import the entry module, which registers its handlers.

    Raises:
        BootFailed: Whatever it raises, with the end of the traceback; or it registers no job handler.
    """
    global _booting  # noqa: PLW0603 - tells `run()` in the challenge that it is being imported
    sys.path.insert(0, str(target))
    _booting = True
    try:
        importlib.import_module(entry)
    except BaseException as error:
        raise BootFailed(f"importing {entry!r} failed:\n{traceback.format_exc()[-3500:]}") from error
    finally:
        _booting = False
    if not the_challenge.handlers:
        raise BootFailed(f"{entry!r} registers no handler: decorate a function with @challenge.on_job()")


async def serve_challenge(
    challenge: Challenge, boot: Boot | None = None, spec: ChallengeSpec | None = None
) -> int:
    """Serve an imported challenge until its VM's lifetime is over. Returns the exit code."""
    boot = boot or read_boot()
    server = ChallengeServer(challenge, boot.config, Health("ready"))
    if spec is not None:
        server.max_result = spec.result.max_bytes
        server.per_job = spec.execution.cvm == "per_job"
    stop = asyncio.Event()
    end_on_signals(stop)
    await server.serve(stop=stop)
    return 0


async def boot_and_serve() -> int:
    """The whole of platform-boot. Returns the exit code: 1 when it failed."""
    health = Health()
    try:
        boot = read_boot()
    except SdkError as error:
        print(f"platform-boot: {error}", file=sys.stderr, flush=True)
        return 1
    server = ChallengeServer(the_challenge, boot.config, health)
    stop = asyncio.Event()
    end_on_signals(stop)
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(port=PORT, stop=stop))
        try:
            await _prepare(boot, server)
        except SdkError as error:
            health.status, health.error = "failed", str(error)
            print(f"platform-boot: {error}", file=sys.stderr, flush=True)
            tasks.create_task(_end_after(BOOT_DEADLINE, stop))
            await serving
            return 1
        health.status = "ready"
        print("platform-boot: ready", file=sys.stderr, flush=True)
        await serving
    return 0


async def _prepare(boot: Boot, server: ChallengeServer) -> None:
    target = Path(tempfile.mkdtemp(prefix="challenge-"))
    data = await asyncio.to_thread(fetch_bundle, boot)
    spec = await asyncio.to_thread(unpack_bundle, data, target)
    server.max_result = spec.result.max_bytes
    server.per_job = spec.execution.cvm == "per_job"
    await asyncio.to_thread(import_challenge, target, boot.entry)


async def _end_after(seconds: float, stop: asyncio.Event) -> None:
    await asyncio.sleep(seconds)
    stop.set()


def main() -> None:
    """Entry point of `platform-boot`."""
    sys.exit(asyncio.run(boot_and_serve()))


if __name__ == "__main__":
    main()
