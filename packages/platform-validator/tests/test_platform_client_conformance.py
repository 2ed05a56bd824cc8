"""The in-memory Platform API keeps the port's promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from platform_protocol.ids import ChallengeId, JobId
from platform_protocol.platform_messages import ActiveChallenge
from platform_protocol.resources import Resources
from platform_validator.platform_client.conformance import CASES, Case
from platform_validator.platform_client.memory import MemoryPlatform
from platform_validator.platform_client.port import PlatformClient


class MemoryHarness:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.platform = MemoryPlatform()
        self._clients = [self.platform.client(f"validator-{number}") for number in range(2)]
        self._challenges = 0

    def client(self, number: int = 0) -> PlatformClient:
        return self._clients[number]

    async def add_challenge(self) -> ChallengeId:
        self._challenges += 1
        challenge_id = ChallengeId(f"00000000-0000-4000-9000-{self._challenges:012x}")
        self.platform.put_challenge(
            ActiveChallenge(
                id=challenge_id,
                name=f"challenge-{self._challenges}",
                status="active",
                github_repo="file:///nowhere",
                github_commit="a" * 40,
                resources=Resources(cpu_cores=1, memory_mb=256, disk_mb=512),
            )
        )
        return challenge_id

    async def add_job(self, challenge_id: ChallengeId, submission: bytes | None = None) -> JobId:
        return self.platform.add_job(challenge_id, submission=submission)

    async def cancel_job(self, job_id: JobId) -> None:
        self.platform.cancel_job(job_id)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_platform_in_memory(case: Case, tmp_path: Path) -> None:
    """Platform in memory."""
    await case(MemoryHarness(tmp_path))
