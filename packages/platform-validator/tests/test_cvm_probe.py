"""The SDK's health, as the validator reads it while a CVM boots."""

from __future__ import annotations

import socket
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from platform_validator.cvm.probe import _healthy

WEAKER = "Landlock 7, seccomp and an own uid; lost: network, paths\x1b[2J"


@pytest.mark.parametrize(
    ("told", "logged"),
    [
        ({"containment": "namespaces and seccomp"}, []),
        ({}, []),
        ({"containment": ["odd"]}, []),
        ({"containment": WEAKER}, [WEAKER]),
        ({"containment": "none: no sandbox can be made here \u2028" + "x" * 9000}, ["none: no sandbox"]),
    ],
    ids=["namespaces", "an older SDK", "nonsense", "weaker", "none"],
)
async def test_a_cvm_that_contains_submissions_by_less_is_a_warning(
    told: dict[str, Any], logged: list[str]
) -> None:
    """It is ready all the same; the words are the guest's, so they are cut and kept to one line."""

    async def health(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ready"} | told)

    app = web.Application()
    app.router.add_get("/sdk/health", health)
    runner = web.AppRunner(app)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address: tuple[str, int] = listener.getsockname()[:2]
        await web.SockSite(runner, listener).start()
        with capture_logs() as events:
            async with aiohttp.ClientSession() as http:
                assert await _healthy(http, address)
        await runner.cleanup()
    warnings = [event for event in events if event["event"] == "submissions_contained_by_less"]
    assert len(warnings) == len(logged)
    for warning, beginning in zip(warnings, logged, strict=True):
        assert warning["containment"].startswith(beginning[:16])
        assert warning["log_level"] == "warning"
        assert len(warning["containment"]) < 600
        assert warning["containment"].isascii()
