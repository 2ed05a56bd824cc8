"""A place with a canary for repositories and servers that were made to do harm."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from author import Author
from git_server import GitServer
from processes import processes_about

from platform_protocol.spec import SpecInvalid, parse_platform_toml
from platform_validator.challenges.git_source import GitSource
from platform_validator.challenges.source import SourceError

MIB = 1024 * 1024


class Trap:
    """A place with a canary, a good challenge, and hostile ones made by the tests."""

    def __init__(self, folder: Path, server: GitServer) -> None:
        self.folder = folder
        self.server = server
        self.cache = folder / "caches"
        self.source = self.source_of(cache="main")
        self.canary = folder / "outside" / "canary"
        self.canary.parent.mkdir()
        self.canary.write_text("alive")
        self.good = Author(folder / "served" / "good")
        self.good_commit = self.good.commit()

    def source_of(self, *, cache: str = "other", max_bytes: int = 64 * MIB, timeout: float = 50) -> GitSource:
        """A source that may also fetch from files."""
        return GitSource(
            cache=self.cache / cache,
            allow=frozenset({"file"}),
            max_bytes=max_bytes,
            timeout=timedelta(seconds=timeout),
        )

    def author(self, name: str = "hostile") -> Author:
        """Who makes a hostile repository."""
        return Author(self.folder / "served" / name)

    def url_of(self, author: Author) -> str:
        """Where it is served."""
        return self.server.url_of(f"{author.folder.name}/.git")

    async def springs(self, repository: str, commit: str, source: GitSource | None = None) -> tuple[str, str]:
        """Fetch and read it as a challenge's provisioning does; the word and the message of its refusal."""
        before = self._outside()
        good = await self.source.fetch(self.url_of(self.good), self.good_commit)
        await asyncio.to_thread(good.bundle.unlink)
        async with asyncio.TaskGroup() as group:
            beside = group.create_task(self.source.fetch(self.url_of(self.good), self.good_commit))
            answer = await self._refusal(source or self.source, repository, commit)
        assert beside.result() == good
        self.assert_nothing_is_left()
        assert self._outside() == before
        word, message = answer
        assert message.isprintable()
        assert len(message) < 1000
        return word, message

    async def _refusal(self, source: GitSource, repository: str, commit: str) -> tuple[str, str]:
        try:
            tree = await source.fetch(repository, commit)
            parse_platform_toml(tree.platform_toml)
        except SourceError as error:
            return error.reason, str(error)
        except SpecInvalid as error:
            return "platform_toml_invalid", str(error)
        return "", "nothing was refused"

    def assert_nothing_is_left(self) -> None:
        """No process at work in the cache, and nothing but bundles and their index in it."""
        assert {entry.name for entry in self.cache.glob("*/*")} <= {"bundles", "commits"}
        assert all(not entry.name.startswith(".") for entry in self.cache.rglob("*"))
        assert all(stat.S_ISREG(e.lstat().st_mode) for e in self.cache.rglob("*") if not e.is_dir())
        assert list(processes_about(str(self.cache))) == []

    def _outside(self) -> dict[str, tuple[int, int]]:
        return {
            str(path): (path.lstat().st_mtime_ns, path.lstat().st_size)
            for path in self.folder.rglob("*")
            if self.cache not in path.parents and path != self.cache and not path.is_dir()
        }


@contextmanager
def traps(tmp_path: Path) -> Iterator[Trap]:
    """One, served."""
    (tmp_path / "served").mkdir()
    with GitServer(tmp_path / "served") as server:
        yield Trap(tmp_path, server)


def packet(data: bytes) -> bytes:
    """A packet line."""
    return b"%04x" % (len(data) + 4) + data


def varint(number: int) -> bytes:
    """A number as packs write it."""
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])
