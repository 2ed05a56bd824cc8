"""The submission of a job: where it is, and how to run it contained. It is never imported."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from platform_challenge_sdk.contained import MIB, Order, Outcome, describe_end, run_contained
from platform_challenge_sdk.errors import ContainmentUnavailable, SubmissionFailed, SubmissionTimedOut


@dataclass(frozen=True, slots=True)
class Submission:
    """`path` is a read-only directory, unpacked inside the CVM; `sha256` (hex) is of the file as uploaded."""

    path: Path
    sha256: str

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | str = b"",
        timeout: float = 60.0,
        memory: int = 256 * MIB,
        files: Mapping[str, bytes] | None = None,
        network: bool = False,
        disk: int = 64 * MIB,
    ) -> Outcome:
        """Run a command of the submission contained, and wait for the end of its whole tree.

        Inside: `/submission` (read-only, the working directory), `/work` and `/tmp` (writable, small, gone
        afterwards), a Python, and nothing else: no network, no SDK, no other process.

        Args:
            argv: The command, found on the sandbox's PATH.
            stdin: Its standard input.
            timeout: Seconds until the whole tree is killed.
            memory: Bytes of address space for each of its processes.
            files: Plain names to contents, placed in `/work`.
            network: Not offered yet: there is no egress proxy.
            disk: Bytes of `/work`.

        Raises:
            ContainmentUnavailable: It cannot be contained here (or `network` was asked for): nothing was run.
        """
        stop = threading.Event()
        order = self._order(argv, stdin, timeout, memory, files, disk, network=network)
        running = asyncio.create_task(asyncio.to_thread(run_contained, order, stop))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait({running})
            raise

    def run_sync(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | str = b"",
        timeout: float = 60.0,
        memory: int = 256 * MIB,
        files: Mapping[str, bytes] | None = None,
        network: bool = False,
        disk: int = 64 * MIB,
    ) -> Outcome:
        """The same, for handlers that are plain functions."""
        return run_contained(self._order(argv, stdin, timeout, memory, files, disk, network=network))

    def _order(
        self,
        argv: Sequence[str],
        stdin: bytes | str,
        timeout: float,
        memory: int,
        files: Mapping[str, bytes] | None,
        disk: int,
        *,
        network: bool,
    ) -> Order:
        if network:
            raise ContainmentUnavailable("network=True: there is no egress proxy, so nothing may go out")
        data = stdin.encode() if isinstance(stdin, str) else stdin
        return Order(
            argv=list(argv),
            submission=self.path,
            stdin=data,
            timeout=timeout,
            memory=memory,
            files=dict(files or {}),
            disk=disk,
        )


def require_ok(outcome: Outcome) -> Outcome:
    """The outcome, if the run ended by itself with exit code 0.

    Raises:
        SubmissionTimedOut: Its time was up.
        SubmissionFailed: It ended otherwise; the message says how, with the end of its stderr.
    """
    if outcome.killed_by == "timeout":
        raise SubmissionTimedOut(describe_end(outcome))
    if not outcome.ok:
        raise SubmissionFailed(describe_end(outcome))
    return outcome
