"""What people read: the status."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from platform_validator.cli import show

QUOTA = {"cpu_cores": {"used": 4, "limit": 4}, "cvms": {"used": 2, "limit": 16}}
NONE = {"cpu_cores": 0, "cvms": 0}


def shown(found: dict[str, Any]) -> list[str]:
    """The lines on a terminal without colours, runs of blanks as one."""
    console = Console(file=io.StringIO(), width=200)
    show.status(found, console)
    text = console.file
    assert isinstance(text, io.StringIO)
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def test_the_quota_is_shown_with_its_parts_and_why_jobs_are_not_claimed() -> None:
    """Parts that hold nothing are left out; what a status of an older daemon lacks is no fault."""
    lines = shown(
        {
            "status": "ok",
            "quota": QUOTA,
            "quota_by_use": {
                "challenge": NONE,
                "job": {"cpu_cores": 3, "cvms": 1},
                "ready": {"cpu_cores": 1, "cvms": 1},
            },
            "waiting": [
                {"reason": "cpu", "jobs": 3, "detail": "2 wanted, 0 free"},
                {"reason": "active_jobs", "jobs": None, "detail": ""},
            ],
            "refused": {"cpu": 12, "cvms": 1},
            "warnings": ["resource_limits.cpu_cores = 9 [sic]"],
        }
    )
    assert lines[1:] == [
        "cpu_cores 4 of 4 (job 3, ready 1)",
        "cvms 2 of 16 (job 1, ready 1)",
        "not claimed 3 pending, cpu: 2 wanted, 0 free",
        "not claimed jobs, active_jobs",
        "no room so far cpu 12x, cvms 1x",
        "warning resource_limits.cpu_cores = 9 [sic]",
    ]
    assert shown({"status": "stopped"}) == ["validator stopped"]
