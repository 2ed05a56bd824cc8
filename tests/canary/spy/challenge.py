"""Another challenge's CVM, which looks for secrets in everything that it can read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from platform_challenge_sdk import Context, challenge, run

KEY = 0x5A
MOST = 32 * 1024 * 1024


def readable() -> Iterator[Path]:
    """Files of this CVM, but for the system's; and what the kernel shows of every process but this one."""
    for folder in ("/etc", "/guest", "/run", "/var", "/tmp", "/data", "/root", "/dstack", "/dev/shm"):
        for parent, _, names in os.walk(folder):
            yield from (Path(parent) / name for name in names)
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            yield from (process / name for name in ("environ", "cmdline", "maps", "mountinfo"))


@challenge.on_job()
def look(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """How many files were read, in how many a secret was found; they come masked, not to find themselves."""
    wanted = [bytes(byte ^ KEY for byte in bytes.fromhex(each)) for each in payload["masked"]]
    own = [value.encode() for value in os.environ.values()]
    read = found = 0
    for path in readable():
        try:
            with path.open("rb") as file:
                data = file.read(MOST)
        except OSError:
            continue
        read += 1
        found += any(secret in data for secret in wanted)
    found += any(secret in value for secret in wanted for value in own)
    return {"score": 0.0, "metrics": {"read": read, "found": found}}


if __name__ == "__main__":
    run()
