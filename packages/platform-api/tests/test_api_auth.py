"""Who may ask: signed requests, nonces, audiences, tokens."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from running_api import Api

from platform_protocol.signing import Keypair


async def test_a_signed_request_of_a_registered_validator_is_answered(api: Api) -> None:
    answer = await api.signed("GET", "/challenges/active")
    assert (answer.status, answer.body) == (200, {"challenges": []})


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"audience": "http://elsewhere.example"}, "bad_signature"),
        ({"timestamp_ms": 1}, "clock_skew"),
        ({"nonce": "short"}, "bad_header"),
        ({"path": "/jobs/pending"}, "bad_signature"),
        ({"body": b"other"}, "bad_signature"),
        ({"instance": "none"}, "bad_header"),
    ],
)
async def test_what_is_wrong_with_a_signature_is_named(api: Api, change: dict[str, Any], code: str) -> None:
    answer = await api.signed("GET", "/challenges/active", change=change)
    assert (answer.status, answer.body["code"]) == (401, code)
    assert answer.headers["Content-Type"] == "application/problem+json"


async def test_an_audience_that_was_dialled_but_is_not_ours_is_named_with_ours(api: Api) -> None:
    port = api.base.rpartition(":")[2]
    answer = await api.signed(
        "GET",
        "/challenges/active",
        change={"audience": f"http://other.test:{port}"},
        extra={"Host": f"other.test:{port}"},
    )
    assert answer.body["code"] == "wrong_audience"
    assert api.base in answer.body["audiences"]


async def test_a_skewed_clock_is_told_the_servers_time(api: Api) -> None:
    answer = await api.signed("GET", "/challenges/active", change={"timestamp_ms": 1})
    server_time = datetime.fromisoformat(answer.body["server_time"])
    assert abs((server_time - datetime.now(UTC)).total_seconds()) < 10


async def test_a_nonce_is_accepted_once(api: Api) -> None:
    fixed = {"nonce": "0" * 32}
    assert (await api.signed("GET", "/challenges/active", change=fixed)).status == 200
    again = await api.signed("GET", "/challenges/active", change=fixed)
    assert (again.status, again.body["code"]) == (401, "nonce_reused")


async def test_a_missing_header_is_named(api: Api) -> None:
    answer = await api.send("GET", "/challenges/active", None, {})
    assert (answer.status, answer.body["code"]) == (401, "missing_header")


async def test_an_unregistered_validator_learns_the_command_that_registers_it(api: Api) -> None:
    stranger = Keypair.from_seed(b"s" * 32)
    answer = await api.signed("GET", "/challenges/active", by=stranger)
    assert (answer.status, answer.body["code"]) == (403, "not_registered")
    assert f"platform-api admin validators add {stranger.address}" in answer.body["detail"]


async def test_a_banned_validator_is_refused(api: Api) -> None:
    await api.admin("POST", "/validators", {"hotkey": api.other.address, "status": "banned"})
    answer = await api.signed("GET", "/challenges/active", by=api.other)
    assert (answer.status, answer.body["code"]) == (403, "banned")


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eA=="}])
async def test_administration_needs_a_token(api: Api, header: dict[str, str]) -> None:
    answer = await api.send("GET", "/validators", None, header)
    assert answer.status == 401


async def test_unknown_paths_and_methods_are_problems_too(api: Api) -> None:
    missing = await api.send("GET", "/nothing", None, {})
    assert (missing.status, missing.body["code"]) == (404, "not_found")
    wrong = await api.send("DELETE", "/health", None, {})
    assert (wrong.status, wrong.body["code"]) == (405, "method_not_allowed")


async def test_the_active_list_has_an_etag(api: Api) -> None:
    await api.challenge()
    first = await api.signed("GET", "/challenges/active")
    again = await api.signed("GET", "/challenges/active", extra={"If-None-Match": first.headers["etag"]})
    assert (first.status, again.status) == (200, 304)
    await api.challenge(name="second")
    changed = await api.signed("GET", "/challenges/active", extra={"If-None-Match": first.headers["etag"]})
    assert len(changed.body["challenges"]) == 2
