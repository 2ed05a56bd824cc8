"""A journal with a long past: the start is quick, and the queries never walk through it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from bench.journal_year import fill, forget_cache, restart

from platform_validator.store.opening import open_database
from platform_validator.store.sqlite import SqliteStore
from platform_validator.store.transactions import load_queries

# The recent jobs, and whichever tables hold only what is present, are read from end to end.
SCANNED = {
    "jobs_recent",
    "jobs_newest_to_go",
    "outbox_all",
    "hosts_drained",
    "instances_all",
    "env_all",
    # All values and all replies: while they are rekeyed, and where somebody asks who keeps how much.
    "values_under_other_keys",
    "replies_under_other_keys",
    "values_scopes",
}


@pytest.mark.slow(reason="writes 80 MB, and reads them from the disk")
@pytest.mark.robustness(8, "start")
async def test_10_000_finished_jobs_at_start_take_under_2_seconds(tmp_path: Path) -> None:
    """Robustness 8: opened, the fleet restored, recovered, with nothing in the page cache."""
    path = tmp_path / "validator.db"
    await fill(path, 10_000)
    forget_cache(path)
    began = time.perf_counter()
    store = await SqliteStore.open(path)
    await restart(store)
    took = time.perf_counter() - began
    assert len(await store.recent_jobs(20_000)) > 10_000
    await store.close()
    assert took < 2.0


@pytest.mark.robustness(8, "start")
def test_no_query_walks_through_the_past(tmp_path: Path) -> None:
    """Robustness 8: each finds its rows by a key or an index, also what is open and what is old."""
    connection = open_database(tmp_path / "validator.db")
    walks = {}
    for name, query in load_queries().items():
        given = dict.fromkeys(re.findall(r":(\w+)", query), "1")
        plan = [row["detail"] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", given)]
        scans = [step for step in plan if step.startswith("SCAN") and not step.endswith("_open")]
        if scans:
            walks[name] = scans
    connection.close()
    assert walks.keys() == SCANNED, walks
