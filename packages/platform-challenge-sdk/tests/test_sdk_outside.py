"""Where the challenge's own HTTP clients find the egress proxy."""

from __future__ import annotations

import urllib.request

import pytest

from platform_challenge_sdk.outside import proxy_environment
from platform_protocol.user_config import UserConfig

PROXY = "http://pv-1:aa@10.0.2.2:3128"


def test_clients_use_the_proxy_for_all_but_the_validator(
    user_config: UserConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As urllib and those that follow it read them, in both spellings."""
    given = user_config.model_copy(update={"proxy_url": PROXY, "validator_base_url": "http://10.0.2.2:18080"})
    variables = proxy_environment(given)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert urllib.request.getproxies()["https"] == PROXY
    assert urllib.request.getproxies()["http"] == PROXY
    assert urllib.request.proxy_bypass("10.0.2.2:18080")
    assert not urllib.request.proxy_bypass("api.example.com")
    upper = {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}
    assert set(variables) == upper | {name.lower() for name in upper}


def test_nothing_is_set_when_nothing_may_go_out(user_config: UserConfig) -> None:
    """A client then tries directly, and finds no route."""
    assert proxy_environment(user_config.model_copy(update={"proxy_url": None})) == {}
