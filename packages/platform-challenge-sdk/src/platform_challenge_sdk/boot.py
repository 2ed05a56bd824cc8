"""`platform-boot`: fetches the challenge's bundle, checks it, unpacks it, imports it, and serves it.

On failure it serves `/sdk/health` with the reason until the boot deadline, so that an import error is
visible on the validator's side.
"""

from __future__ import annotations

import asyncio
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from platform_challenge_sdk.bundle_fetch import fetch_bundle
from platform_challenge_sdk.challenge import challenge as the_challenge
from platform_challenge_sdk.errors import BootFailed, SdkError
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.outside import proxy_environment
from platform_challenge_sdk.program import end_on_signals, exit_program, run_program
from platform_challenge_sdk.serve import PORT, ChallengeServer
from platform_challenge_sdk.standalone import apply_spec, find_containment, read_config, say
from platform_challenge_sdk.tree import import_challenge, unpack_bundle
from platform_challenge_sdk.worker import in_thread
from platform_protocol.user_config import UserConfig

BOOT_DEADLINE = 300.0
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Boot:
    """What platform-boot is told by the measured environment of app-compose."""

    sha256: str
    entry: str


def read_boot() -> Boot:
    """Read CHALLENGE_SHA256 and CHALLENGE_ENTRY.

    Raises:
        BootFailed: One is missing or malformed.
    """
    sha256, entry = os.environ.get("CHALLENGE_SHA256", ""), os.environ.get("CHALLENGE_ENTRY", "challenge")
    if not _SHA256.fullmatch(sha256):
        raise BootFailed("CHALLENGE_SHA256: expected 64 lower-case hex digits in the environment")
    return Boot(sha256, entry)


async def boot_and_serve(port: int = PORT, *, deadline: float = BOOT_DEADLINE) -> int:
    """The whole of platform-boot. Returns the exit code: 1 when it failed.

    Args:
        port: Where it serves.
        deadline: Seconds that booting may take; a failure is shown until then.
    """
    health = Health()
    try:
        config = read_config()
    except BootFailed as error:
        config, health.status, health.error = None, "failed", str(error)
        say(health.error)
    server = ChallengeServer(the_challenge, config, health)
    stop = asyncio.Event()
    end_on_signals(stop)
    end = asyncio.get_running_loop().time() + deadline
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(port=port, stop=stop))
        if config is not None:
            await _prepare(config, server, stop, deadline)
        if health.status == "failed":
            _ = asyncio.get_running_loop().call_at(end, stop.set)
        say(f"ended: {await serving}")
    return 1 if health.status == "failed" else 0


async def _prepare(config: UserConfig, server: ChallengeServer, stop: asyncio.Event, deadline: float) -> None:
    health = server.health
    os.environ.update(proxy_environment(config))
    work = asyncio.ensure_future(_import_bundle(config, server))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait({work, stopped}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if work in done:
            work.result()
            health.status = "ready"
            say("ready")
        elif not done:
            raise BootFailed(f"the challenge was not imported in {deadline:g} s")
    except SdkError as error:
        health.status, health.error = "failed", str(error)
        say(health.error)
    finally:
        work.cancel()
        stopped.cancel()


async def _import_bundle(config: UserConfig, server: ChallengeServer) -> None:
    boot = read_boot()
    trial = asyncio.ensure_future(find_containment())
    try:
        target = Path(tempfile.mkdtemp(prefix="challenge-"))
        data = await in_thread(lambda: fetch_bundle(config, boot.sha256))
        spec = await in_thread(unpack_bundle, data, target)
        apply_spec(spec, server)
        await in_thread(import_challenge, target, boot.entry)
        server.health.containment = await trial
    finally:
        trial.cancel()


def main() -> None:
    """Entry point of `platform-boot`."""
    exit_program(run_program(boot_and_serve()))


if __name__ == "__main__":
    main()
