"""Which repositories may be fetched, and as what: from `github_repo` to the URL that git is given; pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from platform_validator.challenges.source import SourceError

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_OWNER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}/[A-Za-z0-9._-]{1,100}")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_SHOWN = 200


def checked_commit(commit: str) -> str:
    """The commit, which is a whole id.

    Raises:
        SourceError: `not_a_commit`.
    """
    if not _COMMIT.fullmatch(commit):
        raise SourceError(
            "not_a_commit",
            f"expected 40 or 64 lower-case hex digits, got {commit[:80]!r}: name a commit, not a branch",
            lasting=True,
        )
    return commit


def repository_url(repository: str, allow: Collection[str]) -> str:
    """The URL that git is given: `owner/name` is GitHub's, a path is file's.

    Args:
        repository: As the API lists it.
        allow: Schemes beside https (and http on loopback): `ssh`, `file`.

    Raises:
        SourceError: `repository_refused`.
    """
    if _OWNER_NAME.fullmatch(repository):
        return f"https://github.com/{repository}"
    given = f"file://{repository}" if repository.startswith("/") else repository
    # A leading '-' would be an option of git's, '::' one of its remote helpers (ext::), '\' is no URL's.
    plain = given.isprintable() and not given.startswith("-") and "::" not in given.replace("[::1]", "")
    if plain and not set(given) & set("\\ '\"`$<>|;"):
        try:
            if _allowed(urlsplit(given), allow):
                return given
        except ValueError:
            pass
    raise SourceError(
        "repository_refused",
        "expected an https URL without a user, owner/name on GitHub, http on loopback, or a scheme of "
        f"sources.allow ({', '.join(sorted(allow)) or 'none'}), got {repository[:_SHOWN]!r}",
        lasting=True,
    )


def _allowed(parts: SplitResult, allow: Collection[str]) -> bool:
    host, path = parts.hostname or "", parts.path
    named = bool(_NAME.fullmatch(host)) or host in _LOOPBACK
    in_range = parts.port is None or parts.port > 0  # reading it raises ValueError beyond 65535
    anonymous = parts.username is None and parts.password is None
    match parts.scheme:
        case "https":
            return named and anonymous and in_range
        case "http":
            return host in _LOOPBACK and anonymous and in_range
        case "ssh":
            user = parts.username
            known = user is None or bool(_NAME.fullmatch(user))
            return "ssh" in allow and named and in_range and known and parts.password is None and bool(path)
        case "file":
            return "file" in allow and not parts.netloc and path.startswith("/")
        case _:
            return False
