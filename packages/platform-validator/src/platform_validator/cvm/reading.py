"""Guest messages from bytes; what is large is read in a process of its own.

Parsing 60 MB of JSON holds the interpreter for seconds, and with it every other job's session. Run as a
module this is that process: JSON on its standard input, what is needed of it on its output, in `marshal`
form (plain values only: unlike a pickle it runs nothing).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import marshal
import os
import resource
import sys
from dataclasses import dataclass
from typing import Any

from platform_protocol.session.errors import MessageInvalid

LARGE = 8 * 1024 * 1024
"""Bytes from which on a process is started for a message."""
WITHIN = 60.0
"""Seconds that it may take."""
_MEMORY = 4 * 1024**3
_UNREADABLE = 3
_METRICS = 1001
_LOG_LINES = 10_000
_LINE = 8 * 1024
_EVIDENCE = 1024 * 1024
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class ReadMessage:
    """A message's JSON value.

    Of a large `job_result` only what is used is there, and `result_bytes` says how long its result was in
    compact JSON; None when the whole of it is there.
    """

    value: Any
    result_bytes: int | None = None


async def read_message(text: bytes) -> ReadMessage:
    """Parse what a guest sent.

    Raises:
        MessageInvalid: No JSON; or a large message that is no `job_result`, or that takes over 4 GiB or a
            minute to read.
    """
    if len(text) < LARGE:
        return ReadMessage(_loads(text))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("PYTHONPATH", "PATH") if name in os.environ},
    )
    try:
        async with asyncio.timeout(WITHIN):
            answer, _ = await process.communicate(text)
    except (TimeoutError, OSError) as error:
        raise MessageInvalid(f"a message of {len(text)} bytes was not read within {WITHIN:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise MessageInvalid(f"a message of {len(text)} bytes is no job_result, or takes too much to read")
    value, result_bytes = marshal.loads(answer)  # noqa: S302 - our own process wrote it, and nothing in it runs
    return ReadMessage(value, result_bytes)


def condense(message: Any) -> ReadMessage:
    """What is used of a large `job_result`: a judge finds the same in it as in the whole.

    Raises:
        MessageInvalid: It is something else.
    """
    if not isinstance(message, dict) or message.get("type") != "job_result":
        raise MessageInvalid("expected a job_result: no other message is this large")
    kept = {key: value for key, value in message.items() if key not in {"result", "evidence"}}
    evidence, result = message.get("evidence"), message.get("result")
    if evidence is not None and len(_compact(evidence)) <= _EVIDENCE:
        kept["evidence"] = evidence
    if not isinstance(result, dict):
        return ReadMessage(kept | {"result": _shown(result)}, len(_compact(result)))
    return ReadMessage(kept | {"result": _used(result)}, len(_compact(result)))


def _used(result: dict[str, Any]) -> dict[str, Any]:
    used: dict[str, Any] = {}
    if "score" in result:
        used["score"] = _shown(result["score"])
    metrics, logs = result.get("metrics"), result.get("logs")
    if isinstance(metrics, dict):
        used["metrics"] = {name: _shown(metrics[name]) for name in itertools.islice(metrics, _METRICS)}
    elif metrics:
        used["metrics"] = _shown(metrics)
    if isinstance(logs, list):
        used["logs"] = [str(line)[:_LINE] for line in logs[-_LOG_LINES:]]
    return used


def _shown(value: Any) -> Any:
    """Numbers as they are; of anything else the beginning, as text."""
    return value if value is None or isinstance(value, int | float) else repr(value)[:_SHOWN]


def _compact(value: Any) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MessageInvalid("expected text that is UTF-8") from error


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageInvalid("expected one JSON object") from error


def _main() -> int:
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(WITHIN), int(WITHIN)))
    try:
        read = condense(_loads(sys.stdin.buffer.read()))
        sys.stdout.buffer.write(marshal.dumps((read.value, read.result_bytes)))
    except (MessageInvalid, MemoryError, ValueError, RecursionError):
        return _UNREADABLE
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
