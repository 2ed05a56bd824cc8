"""What `validator cvms top` shows."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from platform_validator.cli import top

IDLE: dict[str, Any] = {"name": "pv-idle", "host": "default", "stage": "ready", "challenge_id": "c1"}
BUSY = IDLE | {
    "name": "pv-busy",
    "usage": {
        "cpu_percent": 148.2,
        "cpu_time_ms": 1500,
        "memory_bytes": 2_000_000,
        "memory_peak_bytes": 3_000_000,
        "disk_bytes": 0,
        "network_bytes": None,
    },
}


def test_the_cvm_that_uses_the_most_memory_is_first_and_what_is_unknown_is_a_dash() -> None:
    """Unknown is not zero: a disk that holds nothing says so."""
    console = Console(file=io.StringIO(), width=200)
    console.print(top.table([IDLE, BUSY]))
    text = console.file
    assert isinstance(text, io.StringIO)
    rows = [line.strip("│ ").split("│") for line in text.getvalue().splitlines() if "pv-" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["pv-busy", "default", "ready", "c1", "148 %", "1.5 s", "2.0 MB", "3.0 MB", "0 bytes", "-"],
        ["pv-idle", "default", "ready", "c1", "-", "-", "-", "-", "-", "-"],
    ]


def test_names_are_text_and_no_markup() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(top.table([IDLE | {"challenge_id": "[red]x"}]))
    assert "[red]x" in console.file.getvalue()  # type: ignore[attr-defined] # it is the StringIO
