"""Writes the golden journals: `version-NNNN.sql` for each version of the schema, with rows in every table.

Run it once a migration was added; a file that is there stays as it is, since it stands for journals in the
field. `--into FOLDER` builds all of them anew elsewhere, to compare.
"""

from __future__ import annotations

import argparse
import sqlite3
from pathlib import Path

from platform_validator.store.migrate import known_migrations, migrate

_SIZE = '{"cpu_cores":1,"memory_mb":512,"disk_mb":1024,"gpu_count":0}'
_AT = [f"2026-01-02T03:04:0{second}.678901Z" for second in range(10)]
_COMMIT = "a" * 40

# A table or column that came later stands here with the version that brought it: "kit@2".
_ROWS: dict[str, list[dict[str, object]]] = {
    "meta": [
        {"key": "state_id", "value": "0123456789"},
        {"key": "instance", "value": "00000000-0000-4000-8000-000000000001"},
    ],
    "jobs_journal": [
        {
            "position": 1,
            "claim_id": "claim-ended",
            "job_id": "job-ended",
            "challenge_id": "challenge",
            "instance_key": "key-old",
            "resources": _SIZE,
            "stage": "done",
            "claimed_at": _AT[0],
            "granted": b'{"attempt":1}',
            "attempt": 1,
            "token": "token-ended",
            "vm": "pv-gone",
            "outcome": "lease_lost",
            "reason": "lease_lost",
            "started_at": _AT[1],
            "ended_at": _AT[2],
        },
        {
            "position": 2,
            "claim_id": "claim-submitting",
            "job_id": "job-submitting",
            "challenge_id": "challenge",
            "instance_key": "key-new",
            "resources": _SIZE,
            "stage": "submitting",
            "claimed_at": _AT[3],
            "granted": b'{"attempt":3}\xff\x00',
            "attempt": 3,
            "token": "token-submitting",
            "vm": "pv-destroying",
            "outcome": "succeeded",
            "started_at": _AT[4],
            "kit@2": b"\x00kit",
        },
        {
            "position": 3,
            "claim_id": "claim-pending",
            "job_id": "job-pending",
            "challenge_id": "challenge",
            "instance_key": "key-new",
            "resources": _SIZE,
            "stage": "pending",
            "claimed_at": _AT[5],
        },
    ],
    "jobs_outbox": [
        {
            "position": 1,
            "claim_id": "claim-submitting",
            "job_id": "job-submitting",
            "body": b'{"score":1}\xff\x00',
            "stored_at": _AT[6],
            "tries": 7,
            "last_error": "no answer",
        },
    ],
    "cvms_journal": [
        {
            "position": 1,
            "name": "pv-gone",
            "purpose": "ready",
            "challenge_id": "challenge",
            "instance_key": "key-old",
            "resources": _SIZE,
            "phase": "gone",
            "sealed_secret": b"\x00sealed-gone",
            "compose": b"{}",
            "host_port": 10_001,
            "session_id": "session-gone",
            "intended_at": _AT[0],
            "hard_deadline": _AT[9],
            "vm_id": "id-gone",
            "claim_id": "claim-ended",
            "vm_instance": "aa",
            "attestation": "simulated",
            "reason": "drained",
            "gone_at": _AT[3],
        },
        {
            "position": 2,
            "name": "pv-destroying",
            "purpose": "job",
            "challenge_id": "challenge",
            "instance_key": "key-new",
            "resources": _SIZE,
            "phase": "destroying",
            "sealed_secret": b"\x00sealed-destroying",
            "compose": b'{"a":1}',
            "host_port": 10_002,
            "session_id": "session-destroying",
            "intended_at": _AT[3],
            "hard_deadline": _AT[9],
            "vm_id": "id-destroying",
            "claim_id": "claim-submitting",
            "vm_instance": "bb",
            "attestation": "tdx",
            "reason": "its job has ended",
            "host@4": "small",
            "os_image@7": '{"trust":"pinned"}',
        },
    ],
    "cvms_hosts_drained@4": [{"name": "small", "drained_at": _AT[3]}],
    "challenges_instances": [
        {
            "position": 1,
            "key": "key-old",
            "challenge_id": "challenge",
            "name": "Challenge",
            "repository": "https://example.org/challenge",
            "commit_id": _COMMIT,
            "spec_digest": "digest-old",
            "state": "Recycling",
            "since": _AT[1],
            "reason": "superseded",
            "bundle_sha256": "c" * 64,
            "compose_hash": "d" * 64,
            "superseded_by": "key-new",
            "failures": 2,
        },
        {
            "position": 2,
            "key": "key-new",
            "challenge_id": "challenge",
            "name": "Challenge",
            "repository": "https://example.org/challenge",
            "commit_id": _COMMIT,
            "spec_digest": "digest-new",
            "state": "Active",
            "since": _AT[2],
        },
    ],
    "challenges_history@3": [
        {
            "position": 1,
            "challenge_id": "challenge",
            "key": "key-old",
            "commit_id": _COMMIT,
            "state": "Failed",
            "reason": "no kernel",
            "at": _AT[1],
        },
        {
            "position": 2,
            "challenge_id": "challenge",
            "key": "key-older",
            "commit_id": _COMMIT,
            "state": "Gone",
            "at": _AT[2],
        },
    ],
    "challenges_env@6": [
        {
            "challenge_id": "challenge",
            "name": "KEY",
            "repository": "https://example.org/challenge",
            "sealed": b"\x00sealed-env",
            "given_at": _AT[3],
        },
    ],
    "values_current": [
        {
            "challenge_id": "challenge",
            "key": "k\u00e9",
            "value": "[1]",
            "version": 4,
            "updated_at": _AT[7],
            "size@5": 6,
        },
    ],
    "values_replies": [{"session_id": "session-destroying", "request_id": "r", "reply": "ok"}],
    "values_usage@5": [{"challenge_id": "challenge", "keys": 1, "bytes": 6}],
}


def build(version: int) -> str:
    """The journal of that version, as SQL."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    migrate(connection, known_migrations()[:version])
    for versioned, rows in _ROWS.items():
        table, _, since = versioned.partition("@")
        for row in rows if int(since or 1) <= version else ():
            there = {
                name.partition("@")[0]: value
                for name, value in row.items()
                if int(name.partition("@")[2] or 1) <= version
            }
            marks = ", ".join("?" * len(there))
            connection.execute(
                f"INSERT INTO {table} ({', '.join(there)}) VALUES ({marks})",
                list(there.values()),
            )
    text = "\n".join(connection.iterdump()) + "\n"
    connection.close()
    return text


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path)
    into: Path | None = parser.parse_args().into
    for step in known_migrations():
        path = (into or Path(__file__).parent) / f"version-{step.version:04}.sql"
        if not path.exists():
            path.write_text(build(step.version), encoding="utf-8")


if __name__ == "__main__":
    main()
