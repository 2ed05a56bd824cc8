"""A challenge's code as the rest of the validator sees it: a tree at a commit, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from platform_validator.errors import ValidatorError


class SourceError(ValidatorError):
    """A challenge's code could not be had. `reason` is a stable word; `lasting`: only a new commit helps.

    | reason | |
    |---|---|
    | `not_a_commit` | `github_commit` is a branch or an abbreviation |
    | `repository_refused` | a scheme or form that `sources.allow` does not allow |
    | `repository_not_found` | the server has no such repository, or wants credentials |
    | `repository_moved` | the server redirects, and redirects are not followed |
    | `commit_not_found` | it has no such commit (any more) |
    | `git_unreachable` | the server does not answer |
    | `git_timed_out` | the fetch took too long |
    | `git_failed` | git ended with an error that is none of these |
    | `repository_too_large` | more came than the limit, and the fetch was ended |
    | `tree_refused` | a tree that cannot be a bundle: a link out, a submodule, `..`, too much of anything |
    | `platform_toml_invalid` | platform.toml is larger than 256 KiB |
    | `no_platform_toml`, `no_such_file` | a file is not there |
    | `credentials_refused` | a file of `sources.*_file` is not there or readable by others |
    | `cache_failed` | the cache cannot be read or written |
    """

    def __init__(self, reason: str, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class FetchedTree:
    """A tree in the cache: `bundle` is the file, named by `bundle_sha256`."""

    bundle_sha256: str
    bundle: Path
    platform_toml: bytes


class Source(Protocol):
    """Gives a challenge's tree at a commit: `GitSource`, or a simulation's."""

    async def fetch(self, repository: str, commit: str) -> FetchedTree:
        """The tree. Raises SourceError."""

    def file_of(self, tree: FetchedTree, path: str) -> bytes:
        """A file of a fetched tree. Raises SourceError."""
