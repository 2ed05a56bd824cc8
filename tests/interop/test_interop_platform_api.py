"""The validator's client against the real Platform API: the port's conformance suite over the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.network.real_api import RealApi, running_real_api

from platform_validator.platform_client.conformance import CASES, Case


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[RealApi]:
    """A server, two validators and an administrator."""
    async with running_real_api(tmp_path) as real:
        yield real


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_real_platform_api(case: Case, api: RealApi) -> None:
    """The real server and the real client keep the port's promises."""
    await case(api)
