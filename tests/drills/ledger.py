"""What a validator's journal and the Platform API's database say of an update, once it is over."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

GONE_WITHIN = timedelta(seconds=10)
_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Ledger:
    """Rows of the journal. `history` is of one challenge, oldest first."""

    claims: list[dict[str, Any]]
    cvms: list[dict[str, Any]]
    history: list[dict[str, Any]]

    @classmethod
    def read(cls, journal: Path, challenge_id: str) -> Ledger:
        """From the database file."""
        with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True, timeout=_TIMEOUT)) as connection:
            connection.row_factory = sqlite3.Row

            def rows(table: str) -> list[dict[str, Any]]:
                query = f"SELECT * FROM {table} WHERE challenge_id = ? ORDER BY position"
                return [dict(row) for row in connection.execute(query, [challenge_id])]

            return cls(rows("jobs_journal"), rows("cvms_journal"), rows("challenges_history"))

    def wrong_commits(self, jobs: Iterable[Mapping[str, Any]], versions: Mapping[float, str]) -> int:
        """Results whose commit, or whose code, is not what the attempt was claimed for.

        Args:
            jobs: Of the Platform API, with the accepted result.
            versions: Commits by what their code says of itself.
        """
        claimed = {
            (row["job_id"], row["attempt"]): row["instance_key"].split(":")[1]
            for row in self.claims
            if row["attempt"] is not None
        }
        wrong = 0
        for job in jobs:
            result = json.loads(job["result"]) if job["result"] else None
            if result is not None:
                expected = claimed.get((job["id"], result["attempt"]))
                wrong += {result["github_commit"], versions.get(result["score"])} != {expected}
        return wrong

    def gap(self) -> timedelta:
        """How long no instance took jobs, from the first time that one did to the end of the last job."""
        serves: dict[str, bool] = {}
        total, since = timedelta(0), None
        last = max((_moment(row["ended_at"]) for row in self.claims if row["ended_at"]), default=None)
        for row in self.history:
            at = _moment(row["at"])
            began = any(serves.values())
            # Active with a reason: it takes no jobs.
            serves[row["key"]] = row["state"] == "Active" and row["reason"] is None
            if began and not any(serves.values()):
                since = at
            elif since is not None and any(serves.values()):
                total, since = total + (at - since), None
        if since is not None and last is not None:
            total += max(last - since, timedelta(0))
        return total

    def left_of(self, commit: str) -> int:
        """CVMs of a commit that were not gone ten seconds after its last job, or after it was superseded."""
        mine = [row for row in self.claims if f":{commit}:" in row["instance_key"]]
        ends = [_moment(row["ended_at"]) for row in mine if row["ended_at"]]
        ends += [
            _moment(row["at"])
            for row in self.history
            if row["commit_id"] == commit and row["state"] in ("Recycling", "Failed")
        ]
        bound = max(ends) + GONE_WITHIN
        cvms = [row for row in self.cvms if f":{commit}:" in row["instance_key"]]
        return sum(row["gone_at"] is None or _moment(row["gone_at"]) > bound for row in cvms)

    def failures_of(self, commit: str) -> list[str]:
        """Why instances of a commit failed."""
        return [
            row["reason"]
            for row in self.history
            if row["commit_id"] == commit and row["state"] == "Failed" and row["reason"]
        ]


def _moment(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%f%z")
