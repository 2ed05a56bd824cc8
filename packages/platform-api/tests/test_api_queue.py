"""The queue: claims, leases, releases, results. The token fences; the clock only reclaims."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from running_api import Api, result


async def _job(api: Api, **more: Any) -> str:
    made = await api.upload(await api.challenge(**more))
    assert made.status == 201, made.body
    return str(made.body["jobs"][0])


async def test_a_claim_gives_attempt_token_term_and_submission(api: Api) -> None:
    job = await _job(api)
    claim = await api.claim(job)
    assert claim.status == 200
    assert (claim.body["attempt"], claim.body["lease"]["term_s"]) == (1, 120.0)
    assert claim.body["submission"]["url"].startswith("/submissions/")


async def test_the_same_claim_id_gets_the_same_lease_again(api: Api) -> None:
    job = await _job(api)
    first, again = await api.claim(job), await api.claim(job)
    assert first.body["lease"]["token"] == again.body["lease"]["token"]


async def test_another_claim_is_refused_while_it_is_held(api: Api) -> None:
    job = await _job(api)
    await api.claim(job)
    for other in (await api.claim(job, "c2"), await api.claim(job, by=api.other)):
        assert (other.status, other.body["code"]) == (409, "already_claimed")


@pytest.mark.robustness(16, "two-validators")
async def test_of_fifty_claims_at_once_exactly_one_wins(api: Api) -> None:
    job = await _job(api)
    async with asyncio.TaskGroup() as tasks:
        asked = [
            tasks.create_task(api.claim(job, f"c{n}", by=(api.validator, api.other)[n % 2]))
            for n in range(50)
        ]
    statuses = sorted(task.result().status for task in asked)
    assert statuses == [200] + [409] * 49


async def test_a_result_is_accepted_once_and_again_when_it_is_the_same(api: Api) -> None:
    job = await _job(api)
    claim = (await api.claim(job)).body
    body = result(claim)
    path = f"/jobs/{job}/results"
    assert (await api.signed("POST", path, body)).status == 204
    assert (await api.signed("POST", path, dict(reversed(body.items())))).status == 204
    other = await api.signed("POST", path, result(claim, score=0.9))
    assert (other.status, other.body["code"]) == (409, "lease_lost")
    shown = await api.admin("GET", f"/jobs/{job}")
    assert (shown.body["status"], shown.body["score"]) == ("completed", 0.5)
    assert "lease_token" not in shown.body["result"]


@pytest.mark.parametrize(
    "change",
    [
        {"score": "high"},
        {"outcome": "great"},
        {"outcome": "failed", "score": 0.1},
        {"metrics": {"x": None}},
        {"attempt": 7},
        {"error": "x" * 5000},
        {"execution_time_ms": -1},
    ],
)
async def test_an_unacceptable_result_is_422_and_changes_nothing(api: Api, change: dict[str, Any]) -> None:
    job = await _job(api)
    claim = (await api.claim(job)).body
    answer = await api.signed("POST", f"/jobs/{job}/results", result(claim, **change))
    assert (answer.status, answer.body["code"]) == (422, "invalid_result")
    assert (await api.admin("GET", f"/jobs/{job}")).body["status"] == "claimed"


async def test_every_key_of_a_result_is_required(api: Api) -> None:
    job = await _job(api)
    body = result((await api.claim(job)).body)
    for key in body:
        partial = {name: value for name, value in body.items() if name != key}
        assert (await api.signed("POST", f"/jobs/{job}/results", partial)).status == 422


async def test_a_released_job_is_claimable_and_its_old_token_dead(api: Api) -> None:
    job = await _job(api)
    first = (await api.claim(job)).body
    released = {"lease_token": first["lease"]["token"], "reason": "drain"}
    assert (await api.signed("POST", f"/jobs/{job}/release", released)).status == 204
    assert (await api.signed("POST", f"/jobs/{job}/release", released)).status == 204
    second = await api.claim(job, "c2", by=api.other)
    assert second.body["attempt"] == 2
    late = await api.signed("POST", f"/jobs/{job}/results", result(first))
    assert (late.status, late.body["code"]) == (409, "lease_lost")


@pytest.mark.parametrize(
    ("reason", "times", "outcome"), [("sandbox_died", 5, "sandbox_died"), ("infra", 10, "infra_error")]
)
async def test_at_the_limit_of_attempts_the_job_fails_without_a_score(
    api: Api, reason: str, times: int, outcome: str
) -> None:
    job = await _job(api)
    for attempt in range(times):
        claim = (await api.claim(job, f"c{attempt}")).body
        released = {"lease_token": claim["lease"]["token"], "reason": reason}
        assert (await api.signed("POST", f"/jobs/{job}/release", released)).status == 204
    shown = (await api.admin("GET", f"/jobs/{job}")).body
    assert (shown["status"], shown["outcome"], shown["score"]) == ("failed", outcome, None)


async def test_releases_for_capacity_count_to_no_limit(api: Api) -> None:
    job = await _job(api)
    for attempt in range(12):
        claim = (await api.claim(job, f"c{attempt}")).body
        released = {"lease_token": claim["lease"]["token"], "reason": "capacity"}
        await api.signed("POST", f"/jobs/{job}/release", released)
    assert (await api.admin("GET", f"/jobs/{job}")).body["status"] == "pending"


async def test_a_cancelled_job_is_dead_at_once(api: Api) -> None:
    job = await _job(api)
    claim = (await api.claim(job)).body
    assert (await api.admin("POST", f"/jobs/{job}/cancel")).status == 202
    renewal = await api.signed("POST", f"/jobs/{job}/renew", {"lease_token": claim["lease"]["token"]})
    late = await api.signed("POST", f"/jobs/{job}/results", result(claim))
    assert renewal.body["code"] == late.body["code"] == "job_cancelled"
    again = await api.admin("POST", f"/jobs/{job}/cancel")
    assert (again.status, again.body["code"]) == (409, "already_finished")


async def test_only_the_holder_reads_the_submission(api: Api) -> None:
    job = await _job(api)
    claim = (await api.claim(job)).body
    path = claim["submission"]["url"]
    held, other = await api.signed("GET", path), await api.signed("GET", path, by=api.other)
    assert held.body == b"tar"
    assert (other.status, other.body["code"]) == (403, "no_lease")


async def test_the_same_upload_twice_makes_one_job(api: Api) -> None:
    challenge = await api.challenge()
    first, again = await api.upload(challenge), await api.upload(challenge)
    assert first.body["jobs"] == again.body["jobs"]
    assert again.body["duplicate"] is True


async def test_pending_goes_by_priority_then_round_robin(api: Api) -> None:
    first = await api.challenge(name="first")
    second = await api.challenge(name="second")
    urgent = await api.challenge(name="urgent", jobs=[{"priority": 5}])
    for challenge, data in ((first, b"1"), (first, b"2"), (second, b"3"), (urgent, b"4")):
        await api.upload(challenge, data)
    listed = (await api.signed("GET", "/jobs/pending")).body["jobs"]
    assert [job["challenge_id"] for job in listed] == [urgent, first, second, first]
    only = (await api.signed("GET", f"/jobs/pending?challenge_id={second}")).body["jobs"]
    assert [job["challenge_id"] for job in only] == [second]


async def test_the_leaderboard_has_each_miners_best_raw_score(api: Api) -> None:
    challenge = await api.challenge()
    for number, (miner, score) in enumerate(((api.miner, 0.2), (api.miner, 0.8), (api.other, 0.5))):
        job = (await api.upload(challenge, bytes([number]), by=miner)).body["jobs"][0]
        claim = (await api.claim(job)).body
        await api.signed("POST", f"/jobs/{job}/results", result(claim, score=score))
    board = (await api.send("GET", f"/challenges/{challenge}/leaderboard", None, {})).body["leaderboard"]
    assert [(entry["miner_hotkey"], entry["score"]) for entry in board] == [
        (api.miner.address, 0.8),
        (api.other.address, 0.5),
    ]
    shares = (await api.send("GET", f"/challenges/{challenge}/weights", None, {})).body["weights"]
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b'{"a":1,"a":2}', 400), (b"[" * 5000, 400), (b"[]", 422), (b'{"lease_token":1}', 422)],
)
async def test_malformed_bodies_are_clear_refusals(api: Api, body: bytes, status: int) -> None:
    job = await _job(api)
    answer = await api.signed("POST", f"/jobs/{job}/renew", body)
    assert answer.status == status


class TestLapse:
    """A lease that ran out."""

    @pytest.fixture
    def lease_term(self) -> float:
        return 1.0

    async def _lapsed(self, api: Api, job: str) -> None:
        async with asyncio.timeout(10):
            while not (await api.signed("GET", "/jobs/pending")).body["jobs"]:
                await asyncio.sleep(0.1)

    async def test_a_lapsed_lease_still_delivers_while_nobody_claimed(self, api: Api) -> None:
        job = await _job(api)
        claim = (await api.claim(job)).body
        await self._lapsed(api, job)
        assert (await api.signed("POST", f"/jobs/{job}/results", result(claim))).status == 204

    async def test_a_lapsed_lease_renews_while_nobody_claimed(self, api: Api) -> None:
        job = await _job(api)
        claim = (await api.claim(job)).body
        await self._lapsed(api, job)
        renewed = await api.signed("POST", f"/jobs/{job}/renew", {"lease_token": claim["lease"]["token"]})
        assert renewed.status == 200
        assert (await api.claim(job, "c2", by=api.other)).status == 409

    async def test_after_anothers_claim_the_old_token_is_dead(self, api: Api) -> None:
        job = await _job(api)
        claim = (await api.claim(job)).body
        await self._lapsed(api, job)
        assert (await api.claim(job, "c2", by=api.other)).status == 200
        late = await api.signed("POST", f"/jobs/{job}/results", result(claim))
        assert (late.status, late.body["code"]) == (409, "lease_lost")
