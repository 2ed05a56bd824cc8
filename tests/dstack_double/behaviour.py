"""How the versions of dstack differ, one field a quirk."""

from __future__ import annotations

from dataclasses import dataclass

VERSIONS = ("0.5.2", "0.5.5", "0.5.7", "0.5.11", "0.6.0")
"""Those that tests are run against; the last is the head of August 2026."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Of one version.

    Attributes:
        version: Without a `v`.
        debug_errors: Errors in Debug form, over several lines; else one line.
        fields: Fields of VmConfiguration that came later and are known; others are ignored in silence.
        methods: Methods that came later and are known, or that have not gone yet.
        removes_at_once: RemoveVm removes before it answers, and refuses a running VM.
        guards_all: Tokens guard every path; else `/logs` alone.
        disabled_gpus: What a node without GPUs does with `gpus`: drop, refuse, or refuse unless empty.
        checks_ports: A host port that another VM has is refused.
        logs_not_found: `/logs` of an unknown VM is 404; else 200 with an error as its text.
        host_api: `/api/` is mounted on the same listener.
    """

    version: str
    debug_errors: bool
    fields: frozenset[str]
    methods: frozenset[str]
    removes_at_once: bool
    guards_all: bool
    disabled_gpus: str
    checks_ports: bool
    logs_not_found: bool
    host_api: bool
    attach_all: bool
    max_disk: bool
    events: bool
    interfaces: bool
    string_manifest: bool
    signs_time: bool


_FIELDS = {
    "kms_urls": (0, 5, 2),
    "gateway_urls": (0, 5, 2),
    "stopped": (0, 5, 4),
    "no_tee": (0, 5, 6),
    "networking": (0, 5, 6),
    "networks": (0, 6, 0),
    "simulated_tee": (0, 6, 0),
}
_METHODS = {
    "UpdateVm": (0, 5, 6),
    "ReloadVms": (0, 5, 6),
    "SvList": (0, 5, 7),
    "ListRegistryImages": (0, 5, 10),
}


def behaviour(version: str) -> Behaviour:
    """Of `0.5.2` to `0.5.11`, and `0.6.0`."""
    at = tuple(int(part) for part in version.split("."))
    methods = {name for name, since in _METHODS.items() if at >= since}
    if (0, 5, 6) <= at <= (0, 5, 11):
        methods.add("ReportDhcpLease")
    disabled = "drop" if at < (0, 5, 3) else "refuse" if at < (0, 5, 6) else "unless-empty"
    head = at >= (0, 6, 0)
    return Behaviour(
        version=version,
        debug_errors=at <= (0, 5, 5),
        fields=frozenset(name for name, since in _FIELDS.items() if at >= since),
        methods=frozenset(methods),
        removes_at_once=at <= (0, 5, 6),
        guards_all=head,
        disabled_gpus=disabled,
        checks_ports=head,
        logs_not_found=head,
        host_api=not head,
        attach_all=at >= (0, 5, 3),
        max_disk=at <= (0, 5, 3),
        events=at >= (0, 5, 6),
        interfaces=head,
        string_manifest=head,
        signs_time=at >= (0, 5, 6),
    )
