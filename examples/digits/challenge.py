"""Classify handwritten digits: scored by accuracy on digits that the submission never saw, and by speed."""

from __future__ import annotations

import csv
import gzip
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from platform_challenge_sdk import Context, SubmissionFailed, challenge, require_ok, run

DATA = Path(__file__).parent / "data" / "digits.csv.gz"
SEED = "digits-1"
TEST_DIGITS = 500
TRAIN_FILE = "train.csv"
TIME_LIMIT = 5.0
MEMORY = 256 * 1024 * 1024
ACCURACY_SHARE = 0.9


class Digit(NamedTuple):
    """64 pixels, 0 to 16, row by row, and the digit that was written."""

    pixels: tuple[int, ...]
    label: int


def load_digits() -> list[Digit]:
    """All digits in the data's own order."""
    with gzip.open(DATA, "rt", encoding="ascii", newline="") as file:
        rows = [tuple(int(value) for value in row) for row in csv.reader(file)]
    return [Digit(row[:-1], row[-1]) for row in rows]


def split(digits: list[Digit]) -> tuple[list[Digit], list[Digit]]:
    """(train, test): the same for everyone, decided by SEED alone."""

    def drawn(index: int) -> bytes:
        return hashlib.sha256(f"{SEED}:{index}".encode("ascii")).digest()

    order = sorted(range(len(digits)), key=drawn)
    shuffled = [digits[index] for index in order]
    return shuffled[TEST_DIGITS:], shuffled[:TEST_DIGITS]


def questions(test: list[Digit]) -> str:
    """What the submission reads from stdin: pixels, no labels."""
    return "".join(",".join(map(str, digit.pixels)) + "\n" for digit in test)


def lesson(train: list[Digit]) -> bytes:
    """What the submission finds in the file named by its argument: pixels, then the label."""
    return "".join(",".join(map(str, (*digit.pixels, digit.label))) + "\n" for digit in train).encode()


def parse_answers(text: str, expected: int) -> list[int]:
    """One label a line.

    Raises:
        SubmissionFailed: Not as many lines as digits, or a line that is no digit from 0 to 9.
    """
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if len(lines) != expected:
        raise SubmissionFailed(f"expected {expected} lines on stdout, one for each digit, got {len(lines)}")
    for number, line in enumerate(lines, 1):
        if line not in set("0123456789"):
            raise SubmissionFailed(f"stdout line {number}: expected a digit from 0 to 9, got {line[:40]!r}")
    return [int(line) for line in lines]


def score(accuracy: float, seconds: float) -> float:
    """0 to 1: nine tenths accuracy, one tenth the part of the time limit that was not needed."""
    speed = max(0.0, 1.0 - seconds / TIME_LIMIT)
    return ACCURACY_SHARE * accuracy + (1.0 - ACCURACY_SHARE) * accuracy * speed


@challenge.on_job()
async def evaluate(ctx: Context, payload: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001 - takes no options
    """Train and classify in one contained run; the labels of the test part stay here."""
    train, test = split(load_digits())
    ctx.progress(10, f"{len(train)} digits to learn from, {len(test)} to classify")
    outcome = require_ok(
        await ctx.submission.run(
            ["python3", "main.py", f"/workspace/{TRAIN_FILE}"],
            stdin=questions(test),
            timeout=TIME_LIMIT,
            memory=MEMORY,
            files={TRAIN_FILE: lesson(train)},
        )
    )
    answers = parse_answers(outcome.text, len(test))
    right = sum(answer == digit.label for answer, digit in zip(answers, test, strict=True))
    accuracy = right / len(test)
    latency_ms = outcome.usage.wall_ms
    summary = f"{right} of {len(test)} right in {latency_ms} ms"
    ctx.log.info(summary)
    return {
        "score": score(accuracy, latency_ms / 1000),
        "metrics": {"accuracy": accuracy, "latency_ms": latency_ms},
    }


if __name__ == "__main__":
    run()
