"""Environment and values over HTTP: asked for by commands, and what is wrong with them has its word."""

from __future__ import annotations

import pytest
from controlled import TOKEN, Controlled, over_tcp, served

from platform_protocol.ids import ChallengeId
from platform_protocol.values import ValueInvalid
from platform_validator.challenges.environment import EnvRefused
from platform_validator.store.port import StoreUnavailable
from platform_validator.values.commands import GetValue
from platform_validator.values.errors import ValueKeysUnusable, ValueRefused, ValueUnreadable
from platform_validator.web.control import NotStarted


@pytest.fixture
def controlled() -> Controlled:
    return Controlled()


@pytest.mark.parametrize(
    ("body", "fault", "status", "code"),
    [
        (b'{"do": "list"}', None, 200, None),
        (
            b'{"do": "unset", "challenge_id": "c", "name": "N"}',
            EnvRefused("not_found", "no"),
            404,
            "not_found",
        ),
        (b'{"do": "unset", "challenge_id": "c", "name": "N"}', EnvRefused("bad_name", "no"), 422, "bad_name"),
        (b'{"do": "list"}', NotStarted("soon"), 409, "not_started"),
        (b'{"do": "list"}', StoreUnavailable("full"), 503, "journal_unavailable"),
        (b'{"do": "set", "value": {"secret": "canary"}}', None, 400, "bad_body"),
        (b'{"do": "show"}', None, 400, "bad_body"),
        (b"[" * 100_000, None, 400, "bad_body"),
        (b" " * 600_000, None, 413, "too_large"),
    ],
)
async def test_environment_goes_in_by_post(
    controlled: Controlled, body: bytes, fault: Exception | None, status: int, code: str | None
) -> None:
    """Every refusal has its word, and none repeats what was sent."""
    controlled.valued = fault or {"env": []}
    async with (
        served(over_tcp(controlled)) as client,
        client.post("/api/v1/env", data=body, headers=TOKEN) as answer,
    ):
        said = await answer.json()
        assert (answer.status, said.get("code")) == (status, code)
        assert "canary" not in str(said)


async def test_values_are_asked_for_by_commands(controlled: Controlled) -> None:
    """A command reaches the daemon, and its answer comes back; also a read is a POST."""
    controlled.valued = {"key": "k", "value": [1], "version": 2}
    command = {"do": "get", "challenge_id": "c", "key": "k"}
    async with served(over_tcp(controlled)) as client:
        async with client.post("/api/v1/values", json=command, headers=TOKEN) as answer:
            assert answer.status == 200
            assert await answer.json() == controlled.valued
        async with client.get("/api/v1/values", headers=TOKEN) as answer:
            assert answer.status == 405
    assert controlled.asked == [GetValue(challenge_id=ChallengeId("c"), key="k")]


@pytest.mark.parametrize(
    ("body", "fault", "status", "code"),
    [
        (b"", None, 400, "bad_body"),
        (b'{"do": "explode"}', None, 400, "bad_body"),
        (b'{"do": "get", "challenge_id": "c"}', None, 400, "bad_body"),
        (b'{"do": "get", "challenge_id": "c", "key": "k", "x": 1}', None, 400, "bad_body"),
        (b"[" * 100_000, None, 400, "bad_body"),
        (b'{"do": "scopes"}', NotStarted("starting"), 409, "not_started"),
        (b'{"do": "scopes"}', ValueRefused("not_found", "none"), 404, "not_found"),
        (b'{"do": "scopes"}', ValueRefused("challenge_full", "full"), 422, "challenge_full"),
        (b'{"do": "scopes"}', ValueInvalid("bad_key", "no"), 422, "bad_key"),
        (b'{"do": "scopes"}', ValueUnreadable("changed"), 500, "value_unreadable"),
        (b'{"do": "scopes"}', ValueKeysUnusable("no key"), 503, "keys_unusable"),
        (b'{"do": "scopes"}', StoreUnavailable("disk full"), 503, "journal_unavailable"),
    ],
)
async def test_what_is_wrong_with_values_has_its_word(
    controlled: Controlled, body: bytes, fault: Exception | None, status: int, code: str
) -> None:
    """Bad bodies reach nobody; a refusal keeps its code."""
    controlled.valued = fault or {}
    async with (
        served(over_tcp(controlled)) as client,
        client.post("/api/v1/values", data=body, headers=TOKEN) as answer,
    ):
        assert (answer.status, (await answer.json())["code"]) == (status, code)
    assert len(controlled.asked) == (fault is not None)
