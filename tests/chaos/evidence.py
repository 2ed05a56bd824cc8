"""What was promised and what came of it, from databases that no word of the validator's replaces.

The Platform API keeps one result a job, so its table alone could never show a second: triggers in its
database note each acceptance and each claim as it happens. What a validator's journal had stored is read
after each kill, from its file.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from examples.demo.stack import rows

from platform_protocol.canonical import canonical_json, sha256_hex

_ENDED = ("completed", "failed", "cancelled")
_TRIGGERS = """
CREATE TABLE chaos_accepted (job_id TEXT, attempt INTEGER, sha256 TEXT);
CREATE TRIGGER chaos_accepted_noted AFTER UPDATE OF result ON jobs WHEN NEW.result IS NOT NULL BEGIN
    INSERT INTO chaos_accepted VALUES (NEW.id, NEW.attempt, NEW.result_sha256);
END;
CREATE TABLE chaos_claims (job_id TEXT, attempt INTEGER, holder TEXT, before TEXT, lapsed INTEGER);
CREATE TRIGGER chaos_claims_noted AFTER UPDATE OF attempt ON jobs WHEN NEW.attempt <> OLD.attempt BEGIN
    INSERT INTO chaos_claims VALUES (NEW.id, NEW.attempt, NEW.holder, OLD.holder, OLD.status = 'claimed');
END;
"""
_STORED = """
SELECT j.job_id, j.attempt, j.outcome, o.body
FROM jobs_journal AS j LEFT JOIN jobs_outbox AS o ON o.claim_id = j.claim_id
WHERE o.body IS NOT NULL OR j.outcome IN ('succeeded', 'failed', 'timeout', 'lease_lost')
"""

Attempt = tuple[str, int]
"""(job id, number of the attempt)."""


def watch(database: Path) -> None:
    """Have the Platform API's database note what happens in it from now on."""
    connection = sqlite3.connect(database, timeout=10)
    try:
        connection.executescript(_TRIGGERS)
    finally:
        connection.close()


@dataclass(slots=True)
class Stored:
    """Results that journals held: `bodies` their digests, `refused` attempts that others have taken.

    `waiting` counts those that lay undelivered when their validator was killed.
    """

    results: set[Attempt] = field(default_factory=set)
    bodies: dict[Attempt, str] = field(default_factory=dict)
    refused: set[Attempt] = field(default_factory=set)
    waiting: int = 0

    def read(self, journal: Path) -> None:
        """Take in what a dead validator's journal holds.

        Raises:
            sqlite3.Error: It cannot be read.
        """
        for row in rows(journal, _STORED) if journal.exists() else []:
            attempt = row["job_id"], row["attempt"]
            if row["outcome"] == "lease_lost":
                self.refused.add(attempt)
                continue
            self.results.add(attempt)
            if row["body"] is not None:
                self.bodies[attempt] = sha256_hex(canonical_json(json.loads(row["body"])))
                self.waiting += 1


@dataclass(frozen=True, slots=True)
class Figures:
    """What the Platform API's database says in the end; attempts and jobs by name, so that they can be found.

    `lost`: stored by a journal, and not accepted as it was stored. `fenced` are not among them: the Platform
    API gave the job to another validator after the lease had lapsed, and refused the older one's result.
    `double`: accepted although the job had a result. `wrong`: a score that is not the submission's.
    `unended`: jobs without an end; `taken_over` jobs that another validator claimed after their lease lapsed.
    """

    lost: list[Attempt]
    fenced: list[Attempt]
    double: list[Attempt]
    wrong: list[str]
    unended: list[str]
    taken_over: list[str]
    outcomes: dict[str, int]


def figures(database: Path, stored: Stored) -> Figures:
    """Compare what was stored with what the Platform API accepted.

    Raises:
        sqlite3.Error: The database cannot be read, or nobody watched it.
    """
    accepted: dict[Attempt, str] = {}
    double: list[Attempt] = []
    seen: set[str] = set()
    for row in rows(database, "SELECT * FROM chaos_accepted ORDER BY rowid"):
        attempt = row["job_id"], row["attempt"]
        if row["job_id"] in seen:
            double.append(attempt)
        seen.add(row["job_id"])
        accepted.setdefault(attempt, row["sha256"])
    claims = rows(database, "SELECT * FROM chaos_claims")
    taken = {
        (each["job_id"], each["attempt"] - 1)
        for each in claims
        if each["lapsed"] and each["before"] != each["holder"]
    }
    missing = [
        attempt
        for attempt in sorted(stored.results)
        if accepted.get(attempt) is None or stored.bodies.get(attempt, accepted[attempt]) != accepted[attempt]
    ]
    fenced = [each for each in missing if each in taken and each in stored.refused]
    jobs = rows(
        database,
        "SELECT jobs.id, status, outcome, score, result, filename FROM jobs"
        " JOIN submissions ON submissions.id = jobs.submission_id",
    )
    # An accepted result must also be there still.
    kept = {job["id"] for job in jobs if job["result"] is not None}
    lost = [each for each in missing if each not in fenced]
    lost += [each for each in accepted if each[0] not in kept and each not in lost]
    return Figures(
        lost=lost,
        fenced=fenced,
        double=double,
        wrong=[
            job["id"] for job in jobs if job["result"] and job["score"] != expected_score(job["filename"])
        ],
        unended=[job["id"] for job in jobs if job["status"] not in _ENDED],
        taken_over=sorted({job_id for job_id, _ in taken}),
        outcomes=dict(Counter(str(job["outcome"]) for job in jobs)),
    )


def expected_score(filename: str) -> float:
    """What the submission in `n17.tar.gz` scores."""
    return int(filename.removeprefix("n").partition(".")[0]) / 10_000
