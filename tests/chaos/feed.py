"""The work: a challenge with versions, and miners whose submissions never run out."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from examples.demo.miners import Upload, upload
from examples.demo.repositories import commit_all, make_repository
from examples.demo.stack import Stack, rows
from tests.chaos.plan import Version

from platform_protocol.signing import Keypair

_TREE = Path(__file__).parent / "challenge"
_AT_ONCE = 4
_QUICK_S, _SLOW_S = 0.2, 7.0
_SLOW_EVERY = 8
_TIMEOUT_S = 60
_LARGE_MB = 1800
"""Of the 2048 that a validator has by default."""


@dataclass(slots=True)
class Feed:
    """Keeps `queue` jobs open. Some run for longer than a lease's term."""

    stack: Stack
    rng: random.Random
    queue: int
    challenge_id: str = ""
    made: int = 0
    versions: int = 1
    open: int = 0
    ended: int = 0
    _miner: Keypair = field(default_factory=lambda: Keypair.from_seed(b"miner".ljust(32, b".")))

    def begin(self) -> None:
        """Make the repository and register the challenge."""
        commit = make_repository(_TREE, self._repository)
        self.challenge_id = self.stack.add_challenge(
            "echo", self._repository, commit, _TIMEOUT_S, memory_mb=256
        )

    def look(self) -> None:
        """Count the jobs, in the Platform API's database."""
        found = rows(self.stack.database, "SELECT status IN ('pending', 'claimed') AS open FROM jobs")
        self.open = sum(each["open"] for each in found)
        self.ended = len(found) - self.open

    def fill(self) -> None:
        """Upload more where few are open.

        Raises:
            OSError: The Platform API does not take them now.
        """
        for _ in range(min(_AT_ONCE, self.queue - self.open)):
            self._upload()

    def update(self, kind: Version = Version.GOOD) -> None:
        """A new version of the challenge, as its author pushes one.

        Raises:
            OSError: The Platform API does not take it now.
        """
        self.versions += 1
        toml = (_TREE / "platform.toml").read_text()
        change = {
            Version.GOOD: toml,
            Version.BROKEN: toml.replace("[cvm]", "[cmv]"),
            Version.LARGE: toml.replace("memory_mb = 256", f"memory_mb = {_LARGE_MB}"),
        }
        (self._repository / "platform.toml").write_text(f"# {self.versions}\n{change[kind]}")
        commit = commit_all(self._repository, f"version {self.versions}")
        self.stack.admin("PATCH", f"/challenges/{self.challenge_id}", {"github_commit": commit})

    @property
    def _repository(self) -> Path:
        return self.stack.state / "repositories" / "echo"

    def _upload(self) -> None:
        number = self.made = self.made + 1
        seconds = _SLOW_S if number % _SLOW_EVERY == 0 else self.rng.uniform(0, 2 * _QUICK_S)
        folder = self.stack.state / "submissions" / f"n{number}"
        folder.mkdir(parents=True)
        (folder / "main.py").write_text(f"import time\ntime.sleep({seconds:.2f})\nprint({number})\n")
        what = Upload("echo", "miner", folder.name, folder)
        try:
            upload(self.stack.base, self.challenge_id, self._miner, what)
        finally:
            shutil.rmtree(folder)
