"""The one suite that client, local VMM and double pass: a test for each check and server."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from tests.conformance.conftest import SERVERS, Server, needs_of

from platform_validator.cvm.conformance import Case
from platform_validator.cvm.dstack.bench import Skipped, bench_of
from platform_validator.cvm.dstack.checks import Check
from platform_validator.cvm.dstack.judge import all_checks

_FIRST_PORT = 16_000 + os.getpid() % 19 * 200
"""Within the range that a VMM maps by default, and apart from another test process."""


@pytest.mark.timeout(300)  # the first of a checkout makes the guest image
@pytest.mark.slow(
    reason="with the local VMM: it builds its runtime, and starts sandboxes and virtual machines"
)
@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_of(name)) for name in SERVERS])
async def test_vmm_conformance(name: str, check: Check | Case, server_of: Callable[[str], Server]) -> None:
    """The server does what its version is documented to do, and nothing that the check made is left."""
    server = server_of(name)
    async with bench_of(
        server.url, token=server.token, image=server.image, start=True, first_port=_FIRST_PORT
    ) as bench:
        try:
            await check(bench)
        except Skipped as reason:
            # What a version does not have is no test of it; its absence is seen by the client's own tests.
            pytest.skip(str(reason))
