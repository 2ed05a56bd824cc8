"""What the demo shows while it runs and at its end."""

from __future__ import annotations

from typing import Any

from examples.demo.miners import Upload
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_COLOURS = {"completed": "green", "failed": "yellow", "cancelled": "red", "claimed": "cyan", "pending": "dim"}


def live(
    jobs: list[dict[str, Any]],
    made: dict[str, Upload],
    status: dict[str, Any] | None,
    vms: list[dict[str, Any]],
    note: str,
    seconds: float,
) -> RenderableType:
    """One frame: jobs with stages, then queue, slots, CVMs and challenges."""
    stages = {job["job_id"]: job["stage"] for job in (status or {}).get("active_jobs", [])}
    table = Table("challenge", "miner", "submission", "status", "stage", "score", box=None, pad_edge=False)
    for job in jobs:
        what = made.get(job["id"])
        if what is None:
            continue
        score = "" if job["score"] is None else f"{job['score']:.4f}"
        shown = job["outcome"] if job["outcome"] not in (None, "succeeded") else job["status"]
        table.add_row(
            what.challenge,
            what.miner,
            what.name,
            Text(shown, style=_COLOURS.get(job["status"], "")),
            stages.get(job["id"], ""),
            score,
        )
    waiting = sum(job["status"] == "pending" for job in jobs)
    slots = (status or {}).get("slots", {"used": 0, "total": 0})
    challenges = ", ".join(f"{one['name']} {one['state']}" for one in (status or {}).get("challenges", []))
    running = sum(vm["status"] == "running" for vm in vms)
    line = (
        f"{seconds:5.1f} s   queue {waiting}   slots {slots['used']}/{slots['total']}   "
        f"CVMs {running} running, {len(vms)} in all   {challenges}"
    )
    health = (status or {}).get("status", "validator does not answer")
    return Group(table, Text(line, style="bold"), Text(f"validator: {health}   {note}"))


def summary(report: dict[str, Any], faults: list[str], console: Console) -> None:
    """Leaderboards, figures, and what did not hold."""
    for name, board in report["leaderboards"].items():
        table = Table(
            "rank", "miner", "submission", "score", "attestation", title=f"{name}: leaderboard", box=None
        )
        for entry in board:
            table.add_row(
                str(entry["rank"]),
                entry["miner"],
                entry["submission"],
                f"{entry['score']:.4f}",
                f"{entry['attestation']}, not a TEE",
            )
        console.print(table)
    figures = {key: value for key, value in report.items() if key != "leaderboards"}
    console.print("  ".join(f"{key} [bold]{value}[/]" for key, value in figures.items()), soft_wrap=True)
    for fault in faults:
        console.print(f"[red]does not hold:[/] {escape(fault)}", soft_wrap=True)
    if not faults:
        console.print("[green]every expectation held[/]")
