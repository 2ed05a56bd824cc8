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


def test_hosts_are_shown_with_what_is_used_of_each() -> None:
    """A limit that is that of all together is left out; so is what a journal without a daemon cannot tell."""
    share = {"used": 3, "limit": 4}
    console = Console(file=io.StringIO(), width=200)
    show.hosts(
        [
            {
                "name": "big",
                "state": "cordoned",
                "why": "no answer",
                "since": "2026-01-02T03:04:05Z",
                "labels": ["rack-1", "gpu"],
                "quota": {"cvms": {"used": 3, "limit": None}, "cpu_cores": share},
            },
            {
                "name": "gone",
                "state": "unknown",
                "since": None,
                "quota": {"cvms": {"used": 1, "limit": None}},
            },
        ],
        console,
    )
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert lines == [
        "name state cvms cpu_cores memory_mb disk_mb gpu_count labels since why",
        "big cordoned 3 3 of 4 rack-1, gpu 2026-01-02T03:04:05Z no answer",
        "gone unknown 1",
    ]


def test_a_closed_host_is_named_in_the_status() -> None:
    """With why, and since when; open ones are not."""
    hosts = [
        {"name": "big", "state": "half_open", "since": "2026", "why": "no room"},
        {"name": "small", "state": "open", "since": None, "why": None},
    ]
    assert shown({"status": "ok", "hosts": hosts})[1:] == ["host big is half_open since 2026: no room"]
