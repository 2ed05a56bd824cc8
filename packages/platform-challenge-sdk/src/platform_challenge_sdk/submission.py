"""The submission of a job: where it is, and how to run it contained. It is never imported."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from platform_challenge_sdk.contained import OUTPUT_BYTES, Order, Outcome, describe_end, run_contained
from platform_challenge_sdk.errors import ContainmentUnavailable, SubmissionFailed, SubmissionTimedOut
from platform_challenge_sdk.means import Means
from platform_challenge_sdk.trial import containment
from platform_challenge_sdk.worker import in_thread


@dataclass(frozen=True, slots=True)
class Submission:
    """`path` is a read-only directory, unpacked inside the CVM; `sha256` (hex) is of the file as uploaded.

    `filename`: the name in `path` of a submission that is a single file; None for an archive. `ended` is set
    when the job is over: what still runs of the submission is then killed. `warn` is told once when runs are
    contained with less than namespaces, and what falls away then. `means`: what the CVM has for runs.
    """

    path: Path
    sha256: str
    filename: str | None = None
    ended: threading.Event = field(default_factory=threading.Event, repr=False)
    warn: Callable[[str], None] | None = field(default=None, repr=False)
    means: Means = field(default_factory=Means, repr=False)
    _warned: threading.Event = field(default_factory=threading.Event, repr=False)

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | str = b"",
        timeout: float = 60.0,
        memory: int | None = None,
        files: Mapping[str, bytes] | None = None,
        network: bool = False,
        disk: int | None = None,
        output: int = OUTPUT_BYTES,
    ) -> Outcome:
        """Run a command of the submission contained, and wait for the end of its whole tree.

        Inside: `/submission` (read-only, the working directory), `/workspace` and `/tmp` (writable, gone
        afterwards), a Python, and nothing else: no network, no other process.

        Args:
            argv: The command, found on the sandbox's PATH.
            stdin: Its standard input.
            timeout: Seconds until the whole tree is killed.
            memory: Bytes for all its processes together, and of address space for each. By default 256 MiB,
                or the CVM's memory less 128 MiB for the SDK, which nobody may exceed.
            files: Plain names to contents, placed in `/workspace`.
            network: Whether it may reach the egress proxy, and nothing else, through a relay on its own
                loopback; HTTP_PROXY and HTTPS_PROXY inside name it. It never has the CVM's credentials.
            disk: Bytes of `/workspace`, `/tmp` and `/dev/shm` together. By default 64 MiB, limited as memory.
            output: Bytes of stdout and stderr together; more ends the run.

        Raises:
            ContainmentUnavailable: It cannot be contained here, or `network` was asked for where nothing may
                go out, or where there are no network namespaces: nothing was run.
            ValueError: A command, file name or limit that makes no sense, or more than the CVM has.
        """
        order = self._order(argv, stdin, timeout, memory, files, disk, output, network=network)
        stop = threading.Event()
        running = asyncio.ensure_future(in_thread(self._run, order, [stop, self.ended]))
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
        memory: int | None = None,
        files: Mapping[str, bytes] | None = None,
        network: bool = False,
        disk: int | None = None,
        output: int = OUTPUT_BYTES,
    ) -> Outcome:
        """The same, for handlers that are plain functions."""
        order = self._order(argv, stdin, timeout, memory, files, disk, output, network=network)
        return self._run(order, [self.ended])

    def _run(self, order: Order, cancelled: Sequence[threading.Event]) -> Outcome:
        kind = containment()
        if kind.lost and self.warn is not None and not self._warned.is_set():
            self._warned.set()
            self.warn(f"the submission is contained by {kind}")
        return run_contained(order, cancelled, kind)

    def _order(
        self,
        argv: Sequence[str],
        stdin: bytes | str,
        timeout: float,
        memory: int | None,
        files: Mapping[str, bytes] | None,
        disk: int | None,
        output: int,
        *,
        network: bool,
    ) -> Order:
        tree, address_space, room = self.means.share(memory, disk)
        egress = self.means.egress if network else None
        if network and egress is None:
            raise ContainmentUnavailable(
                "network=True: nothing may go out of this CVM: its challenge declares no hosts in [network], "
                "or its operator allows none of them"
            )
        return Order(
            argv=list(argv),
            submission=self.path,
            stdin=stdin.encode() if isinstance(stdin, str) else stdin,
            timeout=timeout,
            memory=tree,
            files=dict(files or {}),
            disk=room,
            output=output,
            address_space=address_space,
            processes=self.means.processes,
            egress=egress,
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
