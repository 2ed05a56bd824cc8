"""Hostile and careless clients: bodies, ids, changes, logs, a restart."""

from __future__ import annotations

from typing import Any

import pytest
from running_api import Api, result

from platform_api.config import ApiSettings
from platform_api.database import Database
from platform_api.queue import Queue


async def _claimed(api: Api) -> tuple[str, dict[str, Any]]:
    job = (await api.upload(await api.challenge())).body["jobs"][0]
    return job, (await api.claim(job)).body


@pytest.mark.parametrize(
    "job",
    [
        "x",
        "%00",
        "..%2F..%2Fhealth",
        "%F0%9F%92%A5",
        "a" * 5000,
        "0" * 36,
        "9" * 8 + "-9999" * 3 + "-" + "9" * 12,
    ],
)
async def test_an_id_that_is_none_is_an_unknown_job(api: Api, job: str) -> None:
    answer = await api.admin("GET", f"/jobs/{job}")
    assert answer.status == 404
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    "body", [b'{"priority":1e999}', b'{"x":NaN}', b'{"a":1,"a":2}', b"[" * 100_000, b"\xff", b"", b"{" * 20]
)
async def test_no_administrators_body_breaks_the_server(api: Api, body: bytes) -> None:
    answer = await api.admin("POST", "/jobs", body)
    assert answer.status in (400, 422)
    assert answer.headers["Content-Type"] == "application/problem+json"


async def test_a_body_over_its_paths_limit_is_413_before_it_is_read(api: Api) -> None:
    job, _ = await _claimed(api)
    answer = await api.signed("POST", f"/jobs/{job}/renew", b" " * (256 * 1024 + 1))
    assert (answer.status, answer.body["code"]) == (413, "too_large")


@pytest.mark.parametrize("payload", [{"n": 2**60}, {"s": "\ud800"}])
async def test_a_payload_that_is_no_i_json_is_422(api: Api, payload: dict[str, Any]) -> None:
    answer = await api.admin("POST", "/jobs", {"challenge_id": await api.challenge(), "payload": payload})
    assert (answer.status, answer.body["code"]) == (422, "invalid_request")


@pytest.mark.parametrize(
    "change",
    [{"status": None}, {"github_commit": "main"}, {"github_commit": "a" * 41}, {"jobs": []}, {"surprise": 1}],
)
async def test_an_unacceptable_change_of_a_challenge_is_422(api: Api, change: dict[str, Any]) -> None:
    answer = await api.admin("PATCH", f"/challenges/{await api.challenge()}", change)
    assert (answer.status, answer.body["code"]) == (422, "invalid_request")


async def test_logs_are_kept_once_and_their_gaps_counted(api: Api) -> None:
    job, claim = await _claimed(api)
    for seq, line in ((0, "a"), (0, "again"), (3, "é" * 9000)):
        body = {"lease_token": claim["lease"]["token"], "seq": seq, "lines": [line]}
        assert (await api.signed("POST", f"/jobs/{job}/logs", body)).status == 204
    kept = (await api.admin("GET", f"/jobs/{job}/logs")).body
    assert [batch["seq"] for batch in kept["batches"]] == [0, 3]
    assert kept["log_gaps"] == 2
    assert len(kept["batches"][1]["lines"][0].encode()) == 8192


async def test_a_miner_cancels_its_own_job_and_nobody_elses(api: Api) -> None:
    job, _ = await _claimed(api)
    path = f"/jobs/{job}/cancel"
    form: dict[str, Any] = {"role": "miner", "change": {"instance": ""}}
    other = await api.signed("POST", path, by=api.other, **form)
    assert (other.status, other.body["code"]) == (403, "not_owner")
    assert (await api.signed("POST", path, by=api.miner, **form)).status == 202


async def test_another_validator_cannot_use_a_token_that_it_got_hold_of(api: Api) -> None:
    job, claim = await _claimed(api)
    stolen = await api.signed("POST", f"/jobs/{job}/results", result(claim), by=api.other)
    assert (stolen.status, stolen.body["code"]) == (409, "lease_lost")


async def test_results_are_listed_since_a_moment(api: Api) -> None:
    job, claim = await _claimed(api)
    await api.signed("POST", f"/jobs/{job}/results", result(claim))
    path = f"/challenges/{claim['challenge_id']}/results"
    found = (await api.send("GET", path, None, {})).body["results"]
    assert [one["job_id"] for one in found] == [job]
    since = found[0]["finished_at"]
    assert len((await api.send("GET", f"{path}?since={since}", None, {})).body["results"]) == 1
    assert (await api.send("GET", f"{path}?since=2999-01-01T00:00:00Z", None, {})).body["results"] == []
    assert (await api.send("GET", f"{path}?since=yesterday", None, {})).status == 422


async def test_a_start_extends_every_lease_by_one_term(api: Api) -> None:
    job, _ = await _claimed(api)
    database = await Database.open(ApiSettings(database_url=api.database_url).database_url)
    queue = Queue(60_000)
    async with database.write() as connection:
        before = (await queue.job(connection, job))["expires_at"]
        assert await queue.extend_all(connection) == 1
        after = (await queue.job(connection, job))["expires_at"]
    await database.close()
    assert after - before == 60_000


async def test_no_token_is_shown_by_any_read(api: Api) -> None:
    job, claim = await _claimed(api)
    shown = await api.admin("GET", f"/jobs/{job}")
    assert claim["lease"]["token"] not in str(shown.body)
