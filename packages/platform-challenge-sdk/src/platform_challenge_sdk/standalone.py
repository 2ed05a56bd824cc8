"""`run()`: serves a challenge that was started as a program of its own inside its CVM."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from pydantic import ValidationError

from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.challenge import challenge as the_challenge
from platform_challenge_sdk.errors import BootFailed, ContainmentUnavailable
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.means import MIB
from platform_challenge_sdk.program import end_on_signals, exit_program, run_program
from platform_challenge_sdk.serve import PORT, ChallengeServer
from platform_challenge_sdk.tree import importing
from platform_challenge_sdk.trial import containment
from platform_challenge_sdk.worker import in_thread
from platform_protocol.compose import USER_CONFIG_PATH
from platform_protocol.spec import ChallengeSpec, SpecInvalid, parse_platform_toml
from platform_protocol.user_config import UserConfig


def run() -> None:
    """Serve the process's challenge: for a challenge started as a program inside its CVM.

    `platform-boot` imports the challenge and serves it; there this does nothing.
    """
    if importing():
        return
    tree = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").parent
    try:
        code = run_program(serve_challenge(the_challenge, tree))
    except BootFailed as error:
        say(str(error))
        code = 1
    exit_program(code)


async def serve_challenge(challenge: Challenge, tree: Path, port: int = PORT) -> int:
    """Serve an imported challenge until its VM's lifetime is over. Returns the exit code.

    Raises:
        BootFailed: No user_config, or a platform.toml in `tree` that is none.
    """
    server = ChallengeServer(challenge, read_config(), Health("ready"))
    toml = tree / "platform.toml"
    if toml.is_file():
        try:
            apply_spec(parse_platform_toml(toml.read_bytes()), server)
        except SpecInvalid as error:
            raise BootFailed(str(error)) from error
    server.health.containment = await find_containment()
    stop = asyncio.Event()
    end_on_signals(stop)
    say(f"ended: {await server.serve(port=port, stop=stop)}")
    return 0


def read_config() -> UserConfig:
    """Read user_config (PLATFORM_USER_CONFIG overrides its path).

    Raises:
        BootFailed: It is missing, or has wrong or missing keys; it is never quoted.
    """
    path = Path(os.environ.get("PLATFORM_USER_CONFIG", USER_CONFIG_PATH))
    try:
        return UserConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BootFailed(f"user_config cannot be read at {path}: {error.strerror}") from error
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, fault["loc"])) or "no JSON object" for fault in error.errors())
        raise BootFailed(f"user_config has wrong or missing keys: {fields}") from None


def apply_spec(spec: ChallengeSpec, server: ChallengeServer) -> None:
    """What platform.toml says of jobs and results."""
    server.max_result = spec.result.max_bytes
    server.memory = None if spec.cvm.memory_mb is None else spec.cvm.memory_mb * MIB
    server.jobs.per_job = spec.execution.cvm == "per_job"
    server.jobs.concurrency = spec.execution.concurrency


async def find_containment() -> str:
    """How submissions are contained here, in words; tried before the first of them is here."""
    try:
        told = str(await in_thread(containment))
    except ContainmentUnavailable as error:
        told = f"none: {error}"
    say(f"containment: {told}")
    return told


def say(line: str) -> None:
    """A line to the VM's serial log."""
    sys.stderr.write(f"platform-boot: {line}\n")
    sys.stderr.flush()
