"""Runs a submission contained, as any challenge does, and trusts what it says more than it should.

Every line that the submission prints goes to the job's log; its last line, if it is JSON, is the result as
it stands. What the challenge itself saw it tells in lines that begin with `arena`.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from pathlib import Path
from typing import Any

from platform_challenge_sdk import Context, challenge, require_ok, run

SECRET = os.environ.get("ARENA_SECRET", "")
MIB = 1024 * 1024
RUN_S = 5.0
MEMORY, DISK, OUTPUT = 128 * MIB, 32 * MIB, 1 * MIB
LINGER_S = 0.7
"""After a run: what outlived it shows itself."""
MARK = "hostile-"
LINES, LINE = 200, 1000


@challenge.on_job()
async def evaluate(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """Look at what was unpacked, run it, look at what is left of it."""
    for what, odd in unpacked(ctx.submission.path).items():
        note(ctx, what, odd)
    if not (ctx.submission.path / "main.py").exists():
        return {"score": 0.25}
    outcome = await ctx.submission.run(
        ["python3", "main.py"],
        timeout=RUN_S,
        memory=MEMORY,
        disk=DISK,
        output=OUTPUT,
        network=(ctx.submission.path / "network").exists(),
    )
    await asyncio.sleep(LINGER_S)
    seen = {
        "exit": outcome.exit,
        "killed_by": outcome.killed_by or "nothing",
        "bytes": len(outcome.stdout) + len(outcome.stderr),
        "cpu_ms": outcome.usage.cpu_time_ms,
        "wall_ms": outcome.usage.wall_ms,
        "peak": outcome.usage.memory_peak_bytes,
        "left": len(programs()),
    }
    lines = outcome.text.splitlines()
    for line in lines[-LINES:]:
        ctx.log.info(line[:LINE])
    for what, found in seen.items():
        note(ctx, what, found)
    require_ok(outcome)
    return result(lines[-1] if lines else "")


def note(ctx: Context, what: str, found: object) -> None:
    """What the challenge itself saw."""
    line = f"arena {what}: {found}"
    ctx.log.info(line)


def result(line: str) -> dict[str, Any]:
    """The submission's last line, if it says a score."""
    try:
        said = json.loads(line)
    except ValueError:
        return {"score": 0.25}
    return said if isinstance(said, dict) and "score" in said else {"score": 0.25}


def unpacked(tree: Path) -> dict[str, str]:
    """What the archive became: kinds of odd files, what plain ones (or links) hold, what lies outside."""
    kinds, texts = [], []
    for path in sorted(tree.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            kinds.append(f"{path.name}={stat.filemode(mode)[0]}")
        elif mode & 0o6000:
            kinds.append(f"{path.name}=setuid")
        elif path.is_file() and path.name != "main.py":
            with path.open("rb") as file:
                texts.append(file.read(2000).decode("utf-8", "replace"))
    outside = [
        str(path)
        for place in ("/tmp", "/data", "/root", "/var/tmp", "/dev/shm")
        for path in Path(place).rglob(f"{MARK}*")
        if tree not in path.parents
    ]
    return {"kinds": ",".join(kinds), "texts": " | ".join(texts)[:4000], "outside": ",".join(outside)}


def programs() -> list[int]:
    """Processes of the submission that are there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"main.py" in words:
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    run()
