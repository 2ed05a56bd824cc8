"""Challenges' code without git: a commit that begins with `b` cannot be had, `…5` is a shared one."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from platform_validator.challenges.source import FetchedTree, SourceError
from platform_validator.clock import Clock

TOML = (
    'name = "simulated"\nversion = "1"\n[cvm]\ncpu_cores = 1\nmemory_mb = 256\ndisk_mb = 512\n'
    "[execution]\nready = {ready}\n"
)
SHARED = TOML + 'cvm = "shared"\nconcurrency = {seats}\n'
_MARK = "5ea75"


class MemorySource:
    """See `platform_validator.challenges.source.Source`."""

    def __init__(self, clock: Clock, dice: random.Random) -> None:
        self._clock = clock
        self._dice = dice

    async def fetch(self, repository: str, commit: str) -> FetchedTree:
        """See the port; how many CVMs are kept ready is the commit's second digit."""
        await self._clock.sleep(self._dice.uniform(0.1, 3.0))
        if commit.startswith("b"):
            raise SourceError("tree_refused", f"{repository}@{commit} has no platform.toml", lasting=True)
        digest = hashlib.sha256(commit.encode()).hexdigest()
        ready = int(commit[1], 16) % 3
        if not commit.endswith("5"):
            return FetchedTree(digest, Path("/nowhere"), TOML.format(ready=ready).encode())
        seats = 1 + int(commit[2], 16) % 3
        marked = f"{_MARK}{seats}{digest[6:]}"
        return FetchedTree(marked, Path("/nowhere"), SHARED.format(ready=ready, seats=seats).encode())

    def file_of(self, tree: FetchedTree, path: str) -> bytes:
        """See the port."""
        del tree
        raise SourceError("tree_refused", f"no {path}", lasting=True)


def seats_of(compose: bytes) -> int | None:
    """How many jobs a CVM made of this runs at once; None: one in its life."""
    _, marked, rest = compose.decode().partition(_MARK)
    return int(rest[0]) if marked else None
