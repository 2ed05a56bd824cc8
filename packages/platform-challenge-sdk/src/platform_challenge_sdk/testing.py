"""Runs a challenge's handler on a submission here, without a VM: for those who write challenges.

    python -m platform_challenge_sdk.testing DIR SUBMISSION [--job NAME] [--payload JSON]

DIR is the challenge's tree, SUBMISSION a file or a folder. The challenge's own code is not contained; the
submission's is, as inside a CVM, wherever namespaces can be made. Values are kept in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import sys
import tarfile
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.challenge import challenge as the_challenge
from platform_challenge_sdk.errors import SdkError
from platform_challenge_sdk.job import JobRun
from platform_challenge_sdk.means import MIB, Means
from platform_challenge_sdk.program import run_program
from platform_challenge_sdk.testing_values import MemoryValues
from platform_challenge_sdk.tree import import_challenge
from platform_challenge_sdk.values import Values
from platform_protocol.ids import ChallengeId, Hotkey, JobId
from platform_protocol.session.messages import (
    CHUNK_BYTES,
    GuestMessage,
    JobExecute,
    JobResult,
    Log,
    SubmissionChunk,
)
from platform_protocol.spec import SpecInvalid, parse_platform_toml

_MAX_RESULT = 1024 * 1024
_HERE = Hotkey("5C4hrfjw9DjXZTzV3MwzrrAr9P1MJhSrvWGWqi1eSuyUpnhM")


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What a validator would have been sent: `result` or `error` `{code,message}`, and the log's lines."""

    result: dict[str, Any] | None
    error: dict[str, Any] | None
    logs: list[str] = field(default_factory=list)


async def run_locally(
    challenge: Challenge,
    submission: bytes | None,
    *,
    job_name: str | None = None,
    payload: dict[str, Any] | None = None,
    max_result: int = _MAX_RESULT,
    values: MemoryValues | None = None,
    means: Means | None = None,
) -> LocalResult:
    """Run one job: on_startup, on_ready, the handler, on_cleanup.

    Args:
        challenge: Its handlers.
        submission: A tar, a tar.gz or a single file, as a miner uploads it; None for a job without one.
        job_name: The job's name; None for the default handler.
        payload: The job's payload.
        max_result: Bytes that the result may have.
        values: What the challenge's values are, and will be; none at first by default.
        means: What the CVM would have for runs; this machine's memory and no way out by default.
    """
    store = values if values is not None else MemoryValues()
    logs: list[str] = []

    def take(message: GuestMessage) -> None:
        if isinstance(message, JobResult):
            ended.set_result(message)
        elif isinstance(message, Log):
            logs.append(f"{message.level}: {message.message}")
        elif (answer := store.answer(message)) is not None:
            loop.call_soon_threadsafe(asked.answered, answer)

    def send(message: GuestMessage) -> None:
        loop.call_soon_threadsafe(take, message)

    loop = asyncio.get_running_loop()
    ended: asyncio.Future[JobResult] = loop.create_future()
    asked = Values(send)
    order = JobExecute(
        job_id=JobId(str(uuid.uuid4())),
        attempt=1,
        challenge_id=ChallengeId("local"),
        job_name=job_name,
        payload=payload or {},
        submission_sha256=None if submission is None else hashlib.sha256(submission).hexdigest(),
    )
    with tempfile.TemporaryDirectory(prefix="challenge-") as scratch:
        job = JobRun(
            order,
            challenge=challenge,
            agent=Agent(()),
            validator=_HERE,
            values=asked,
            send=send,
            max_result=max_result,
            scratch=Path(scratch),
            means=means,
        )
        await challenge.call("startup")
        await challenge.call("ready")
        for offset in range(0, max(1, len(submission)), CHUNK_BYTES) if submission is not None else ():
            part = submission[offset : offset + CHUNK_BYTES] if submission is not None else b""
            last = offset + len(part) == len(submission or b"")
            job.chunk(SubmissionChunk(job_id=order.job_id, offset=offset, last=last, data=part))
        await job.run()
        await challenge.call("cleanup")
    message = await ended
    error = None if message.error is None else message.error.model_dump()
    return LocalResult(message.result, error, logs)


def read_submission(path: Path) -> bytes:
    """A file as it is; a folder as a tar."""
    if path.is_file():
        return path.read_bytes()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for each in sorted(path.rglob("*")):
            tar.add(each, str(each.relative_to(path)), recursive=False)
    return out.getvalue()


async def _main(arguments: argparse.Namespace) -> int:
    tree = Path(arguments.tree).resolve()
    spec = parse_platform_toml((tree / "platform.toml").read_bytes())
    import_challenge(tree, spec.entry)
    sys.stderr.write("testing: the challenge runs here without a VM; only submission.run is contained\n")
    done = await run_locally(
        the_challenge,
        read_submission(Path(arguments.submission)),
        job_name=arguments.job,
        payload=json.loads(arguments.payload),
        max_result=spec.result.max_bytes,
        means=Means(None if spec.cvm.memory_mb is None else spec.cvm.memory_mb * MIB),
    )
    for line in done.logs:
        sys.stderr.write(f"{line}\n")
    shown = {"result": done.result} if done.error is None else {"error": done.error}
    sys.stdout.write(json.dumps(shown, indent=2) + "\n")
    return 0 if done.error is None else 1


def main() -> None:
    """Entry point. Exit code 0: a result; 1: the job failed; 2: it could not be run."""
    parser = argparse.ArgumentParser(prog="python -m platform_challenge_sdk.testing", description=__doc__)
    parser.add_argument("tree", help="the challenge's tree, with its platform.toml")
    parser.add_argument("submission", help="a file, or a folder to be packed")
    parser.add_argument("--job", help="the job's name")
    parser.add_argument("--payload", default="{}", help="the job's payload, JSON")
    arguments = parser.parse_args()
    try:
        code = run_program(_main(arguments))
    except (OSError, ValueError, SpecInvalid, SdkError) as error:
        sys.stderr.write(f"testing: {error}\n")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
