"""What commands print for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table


class CheckLine(Protocol):
    """One line of `validator check`."""

    @property
    def name(self) -> str:
        """What was checked."""

    @property
    def result(self) -> str:
        """ok, warn or fail."""

    @property
    def detail(self) -> str:
        """What was found, and what to do."""


_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "degraded": "yellow"}


def checks(found: Sequence[CheckLine], console: Console) -> None:
    """A line for each check."""
    for one in found:
        colour = _COLOURS[one.result]
        console.print(f"[{colour}]{one.result:>5}[/]  {one.name:<14} {escape(one.detail)}", soft_wrap=True)


class FindingLine(Protocol):
    """A finding of `challenges check`."""

    @property
    def check(self) -> str:
        """What was looked at."""

    @property
    def result(self) -> str:
        """ok, warn or fail."""

    @property
    def detail(self) -> str:
        """What was found."""

    @property
    def line(self) -> int | None:
        """Where."""

    @property
    def suggestion(self) -> str | None:
        """What to do."""


def findings(found: Sequence[FindingLine], console: Console) -> None:
    """A line for each finding, and below it what to do."""
    for one in found:
        colour = _COLOURS[one.result]
        where = f" (line {one.line})" if one.line else ""
        detail = escape("".join(c if c.isprintable() else "?" for c in one.detail) + where)
        console.print(f"[{colour}]{one.result:>5}[/]  {one.check:<14} {detail}", soft_wrap=True)
        if one.suggestion:
            console.print(f"{'':>7}{'':<14} {escape(one.suggestion)}", soft_wrap=True)


def status(found: dict[str, Any], console: Console) -> None:
    """The daemon in short."""
    word = found["status"]
    console.print(f"[bold]validator[/] [{_COLOURS.get(word, 'cyan')}]{word}[/]")
    for name, reason in found.get("reasons", {}).items():
        console.print(f"  [yellow]{escape(name)}[/]: {escape(str(reason))}", soft_wrap=True)
    for key in ("hotkey", "platform_api", "vmm", "vmm_version", "isolation_level", "claiming", "outbox"):
        if key in found:
            console.print(f"  {key:<16} {escape(str(found[key]))}", soft_wrap=True)
    if found.get("simulated_attestation"):
        console.print("  [yellow]attestation is simulated: nothing here is proved by hardware[/]")
    slots = found.get("slots")
    if slots:
        console.print(f"  {'job slots':<16} {slots['used']} of {slots['total']}")
    _room(found, console)


def _room(found: dict[str, Any], console: Console) -> None:
    """What is used, by what, and why there is no more."""
    for kind, share in found.get("quota", {}).items():
        uses = {use: counts[kind] for use, counts in found.get("quota_by_use", {}).items() if counts[kind]}
        parts = ", ".join(f"{use} {count}" for use, count in uses.items())
        console.print(f"  {kind:<16} {share['used']} of {share['limit']}" + (f"  ({parts})" if parts else ""))
    if egress := found.get("egress"):
        line = f"{egress['listen'] or 'down'}, {egress['cvms']} CVMs, {egress['open']} connections"
        console.print(f"  {'egress':<16} {escape(line)}")
    for host in (one for one in found.get("hosts", ()) if one["state"] != "open"):
        line = f"{host['name']} is {host['state']} since {host['since']}: {host['why']}"
        console.print(f"  [yellow]{'host':<16}[/] {escape(line)}", soft_wrap=True)
    for row in found.get("waiting", ()):
        jobs = "jobs" if row["jobs"] is None else f"{row['jobs']} pending"
        detail = f": {row['detail']}" if row["detail"] else ""
        console.print(f"  {'not claimed':<16} {jobs}, {escape(row['reason'] + detail)}", soft_wrap=True)
    refused = ", ".join(f"{name} {count}x" for name, count in found.get("refused", {}).items())
    if refused:
        console.print(f"  {'no room so far':<16} {refused}")
    for warning in found.get("warnings", ()):
        console.print(f"  [yellow]{'warning':<16}[/] {escape(warning)}", soft_wrap=True)


def drain(found: dict[str, Any], console: Console) -> None:
    """A drain that was begun, or is over."""
    if found["phase"] != "ended":
        how = "cancelling what runs" if found["hurried"] else f"{found['jobs']} jobs run on"
        minutes = found["within_s"] / 60
        console.print(f"{found['phase']}: {how}; it ends within {minutes:.0f} min: validator status")
        return
    console.print(f"the daemon has ended after {found['seconds']} s")
    for name, what in (("undelivered", "results wait in the outbox"), ("cvms_left", "CVMs are not gone yet")):
        if found.get(name):
            console.print(f"[yellow]{found[name]} {what}[/]: the next start goes on with them")


def reloaded(found: dict[str, Any], console: Console) -> None:
    """What a reload did."""
    for change in found["applied"]:
        console.print(escape(f"{change['setting']}: {change['old']} -> {change['new']}"), soft_wrap=True)
    for change in found["restart"]:
        line = f"{change['setting']}: {change['new']} needs a restart: {change['reason']}"
        console.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    if not found["applied"] and not found["restart"]:
        console.print("nothing has changed")


def jobs(found: list[dict[str, Any]], console: Console) -> None:
    """Claims, newest first."""
    _table(found, ("job_id", "stage", "outcome", "attempt", "claimed_at", "reason"), console, "no jobs yet")


def cvms(found: list[dict[str, Any]], console: Console) -> None:
    """CVMs, with what each reached outside."""
    rows = [{**one, "egress": _egress(one.get("egress"))} for one in found]
    columns = ("name", "host", "stage", "purpose", "attestation", "since", "egress", "last_error")
    _table(rows, columns, console, "no CVMs")


def _egress(use: dict[str, Any] | None) -> str:
    """Connections, bytes and refusals; a CVM that may reach nothing has none."""
    if use is None:
        return "none"
    refused = sum(use["refused"].values())
    moved = f"{use['connections']} connections, {use['sent_bytes']} B out, {use['received_bytes']} B in"
    return moved + (f", {refused} refused" if refused else "")


def hosts(found: list[dict[str, Any]], console: Console) -> None:
    """VMM hosts with what is used of each."""
    rows = []
    for one in found:
        used = {kind: _of(share) for kind, share in one.get("quota", {}).items()}
        labels = ", ".join(one.get("labels", ()))
        rows.append({**one, **used, "labels": labels, "why": one.get("why") or one.get("error")})
    columns = (
        "name",
        "state",
        "cvms",
        "cpu_cores",
        "memory_mb",
        "disk_mb",
        "gpu_count",
        "labels",
        "since",
        "why",
    )
    _table(rows, columns, console, "no CVMs and no drained hosts in the journal")


def _of(share: dict[str, Any]) -> str:
    return str(share["used"]) if share["limit"] is None else f"{share['used']} of {share['limit']}"


def challenges(found: list[dict[str, Any]], console: Console) -> None:
    """Challenges with their serving instance."""
    rows = []
    for one in found:
        shown = one.get("serving") or one.get("candidate") or {}
        candidate = one.get("candidate") if one.get("serving") else None
        rows.append(
            {
                "name": one["name"],
                "state": one["state"],
                "commit": str(shown.get("commit", ""))[:12],
                "reason": shown.get("reason") or (candidate or {}).get("reason"),
                "candidate": (candidate or {}).get("state"),
            }
        )
    _table(rows, ("name", "state", "commit", "candidate", "reason"), console, "no challenges")


def challenge(found: dict[str, Any], console: Console) -> None:
    """One challenge: what serves, what is tried, what leaves; then what became of them, newest first."""
    console.print(f"[bold]{escape(found['name'])}[/]  {found['id']}  {found['state']}", highlight=False)
    named = [("serving", found.get("serving")), ("candidate", found.get("candidate"))]
    named += [("leaving", old) for old in found.get("old", ())]
    rows = [
        one | {"": name, "commit": one["commit"][:12], "since": str(one["since"])[:19]}
        for name, one in named
        if one
    ]
    columns = ("", "state", "since", "commit", "mode", "ready", "jobs", "failures", "reason")
    _table(rows, columns, console, "no instance yet")
    if found.get("effective"):
        in_force(found["effective"], console)
    past = [
        {
            "at": str(event["at"])[:23],
            "commit": event["commit"][:12],
            "state": event["state"] or "gone",
            "reason": event["reason"],
        }
        for event in found["history"]
    ]
    console.print()
    _table(past, ("at", "commit", "state", "reason"), console, "no history yet")


def in_force(found: dict[str, Any], console: Console) -> None:
    """What is in force for a challenge here, the operator's side applied."""
    network, size, limits = found["network"], found["resources"], found["limits"]
    refused = [*network["refused_hosts"], *network["refused_ports"]]
    hosts = ", ".join(network["hosts"]) or "nothing"
    reached = f"{hosts} at {', '.join(map(str, network['ports']))}" if network["ports"] else hosts
    rule = {key: value for key, value in found["scoring"].items() if value != {}}
    env = [f"{name} {said}" for name, said in found["env"].items()]
    lines = {
        "image": found["image"],
        "one CVM": ", ".join(f"{kind} {count} of {limits[kind]}" for kind, count in size.items()),
        "jobs": f"{found['cvm']}, {found['timeout_s']:.0f} s at most, {found['ready']} CVMs kept ready",
        "result": f"{found['max_result_bytes']} bytes at most",
        "network policy": reached + (f"; refused: {', '.join(map(str, refused))}" if refused else ""),
        "filesystem": _filesystem(found["filesystem"], found["image"]),
        "scoring": ", ".join(f"{key} {value}" for key, value in rule.items()),
        "environment": ", ".join(env) or "none declared",
        "compose hash": found["compose_hash"],
    }
    console.print("\nin force:")
    for name, what in lines.items():
        console.print(f"  {name:<16} {escape(str(what))}", soft_wrap=True, highlight=False)


def _filesystem(found: dict[str, Any], image: str) -> str:
    """The policy; dstack knows none, and its images have names of their own."""
    words = ["root read-only" if found["read_only"] else "root writable"]
    words += [f"also writable: {', '.join(found['allowed_paths'])}"] if found["allowed_paths"] else []
    words += [f"hidden: {', '.join(found['denied_paths'])}"] if found["denied_paths"] else []
    words += [] if found["tmpfs_size_mb"] is None else [f"{found['tmpfs_size_mb']} MB writable in all"]
    words += [] if image.startswith("local-") else ["dstack does not enforce it"]
    return "; ".join(words)


def env(found: list[dict[str, Any]], console: Console) -> None:
    """Variables that were given, without their values."""
    _table(found, ("challenge_id", "name", "repository", "given_at"), console, "no variables were given")


def config(rows: list[dict[str, Any]], console: Console) -> None:
    """Settings with their origins."""
    _table(rows, ("setting", "value", "from", "reloads", "meaning"), console, "")


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...], console: Console, empty: str) -> None:
    if not rows:
        console.print(empty)
        return
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape("" if row.get(name) is None else str(row[name])) for name in columns))
    console.print(table)


def values(found: dict[str, Any], console: Console) -> None:
    """Which challenges keep values, or which values one keeps; never the values themselves."""
    scopes = "challenges" in found
    table = Table("challenge", "keys", "bytes") if scopes else Table("key", "version")
    for row in found["challenges" if scopes else "values"]:
        table.add_row(*(escape(str(cell)) for cell in row.values()))
    console.print(table if table.row_count else "none")
