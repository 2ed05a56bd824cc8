"""Compress a text and restore it: scored by how many times smaller it became, 0 if it came back changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from platform_challenge_sdk import Context, SubmissionFailed, challenge, require_ok, run

CORPUS = Path(__file__).parent / "data" / "genesis-exodus.txt"
TIME_LIMIT = 8.0
MEMORY = 256 * 1024 * 1024
PROGRAM_BYTES = 16 * 1024
SCORE_MAX = 8.0


def program_bytes(folder: Path) -> int:
    """The size of everything that was submitted: a program that carries the text would compress nothing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def score(original: bytes, compressed: bytes, restored: bytes) -> float:
    """Original size by compressed size, at most SCORE_MAX; 0 unless every byte came back."""
    if restored != original:
        return 0.0
    return min(SCORE_MAX, len(original) / max(1, len(compressed)))


@challenge.on_job()
async def evaluate(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001 - takes no options
    """Two contained runs that share nothing but the compressed bytes."""
    size = program_bytes(ctx.submission.path)
    if size > PROGRAM_BYTES:
        raise SubmissionFailed(f"expected a submission of at most {PROGRAM_BYTES} bytes, got {size}")
    original = CORPUS.read_bytes()
    ctx.progress(10, f"compressing {len(original)} bytes")
    packing = require_ok(
        await ctx.submission.run(
            ["python3", "main.py", "compress"], stdin=original, timeout=TIME_LIMIT, memory=MEMORY
        )
    )
    compressed = packing.stdout
    ctx.progress(50, f"restoring from {len(compressed)} bytes")
    unpacking = require_ok(
        await ctx.submission.run(
            ["python3", "main.py", "restore"], stdin=compressed, timeout=TIME_LIMIT, memory=MEMORY
        )
    )
    restored = unpacking.stdout
    summary = f"{len(original)} bytes became {len(compressed)}, restored to {len(restored)}"
    ctx.log.info(summary)
    return {
        "score": score(original, compressed, restored),
        "metrics": {
            "original_bytes": len(original),
            "compressed_bytes": len(compressed),
            "round_trip": int(restored == original),
            "compress_ms": packing.usage.wall_ms,
            "restore_ms": unpacking.usage.wall_ms,
        },
    }


if __name__ == "__main__":
    run()
