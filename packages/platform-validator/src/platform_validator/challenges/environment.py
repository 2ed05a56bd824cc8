"""What operators give to challenges as environment: sealed at rest, and good for one repository.

A value is stored under the challenge's id with the repository that the challenge had when it was given, and
is bound to both. When the Platform API names another repository, other code would get the value: it is kept
back until the operator gives it again. Values leave the validator in `configure` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from platform_protocol.canonical import canonical_json
from platform_protocol.ids import ChallengeId
from platform_validator.challenges.repository import repository_url
from platform_validator.challenges.source import SourceError
from platform_validator.clock import Clock
from platform_validator.errors import ValidatorError
from platform_validator.keyring import Keyring, KeyringBroken
from platform_validator.store.port import Store
from platform_validator.store.records import EnvRecord

MAX_VALUE = 64 * 1024
MAX_NAMES = 256
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_CONTEXT = b"platform-env-v1\0"


class EnvRefused(ValidatorError):
    """A variable cannot be kept. `code` is a stable word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class GivenEnv:
    """What a challenge at a repository has been given.

    Attributes:
        values: Names with their values; not shown by `repr`.
        elsewhere: Names that were given for another repository, with that.
        unreadable: Names whose value does not open.
    """

    values: Mapping[str, str] = field(default_factory=dict, repr=False)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    unreadable: frozenset[str] = frozenset()


class EnvSource(Protocol):
    """Gives what operators gave: `Environments`, or nothing at all (`NoEnvironments`)."""

    async def given(self, challenge_id: ChallengeId, repository: str) -> GivenEnv:
        """What a challenge at a repository may have. Raises StoreUnavailable."""


class NoEnvironments:
    """Nothing was given to anybody."""

    async def given(self, challenge_id: ChallengeId, repository: str) -> GivenEnv:
        """Nothing."""
        del challenge_id, repository
        return GivenEnv()


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class SetEnv(_Command):
    """Give a variable for a repository, as the Platform API lists it."""

    do: Literal["set"] = "set"
    challenge_id: ChallengeId
    repository: str
    name: str
    value: str = Field(repr=False)


class UnsetEnv(_Command):
    """Forget a variable."""

    do: Literal["unset"] = "unset"
    challenge_id: ChallengeId
    name: str


class ListEnv(_Command):
    """Names and repositories; no values."""

    do: Literal["list"] = "list"
    challenge_id: ChallengeId | None = None


EnvCommand = Annotated[SetEnv | UnsetEnv | ListEnv, Field(discriminator="do")]


class Environments:
    """The variables of all challenges.

    Args:
        store: Keeps them.
        keyring: Seals them.
        clock: When they were given.
    """

    def __init__(self, *, store: Store, keyring: Keyring, clock: Clock) -> None:
        self._store = store
        self._keyring = keyring
        self._clock = clock

    async def given(self, challenge_id: ChallengeId, repository: str) -> GivenEnv:
        """See the port."""
        here = _same_form(repository)
        values: dict[str, str] = {}
        elsewhere: dict[str, str] = {}
        unreadable: set[str] = set()
        for record in await self._store.env(challenge_id):
            if record.repository != here:
                elsewhere[record.name] = record.repository
                continue
            try:
                values[record.name] = self._keyring.open(record.sealed, _context(record)).decode()
            except KeyringBroken:
                unreadable.add(record.name)
        return GivenEnv(values, elsewhere, frozenset(unreadable))

    async def perform(self, command: SetEnv | UnsetEnv | ListEnv) -> dict[str, Any]:
        """What an operator does with them; never answers a value.

        Raises:
            EnvRefused: `bad_name`, `bad_value`, `too_many`, `not_found`.
            StoreUnavailable: The journal cannot be read or written.
        """
        match command:
            case SetEnv():
                await self._set(command)
                return {"challenge_id": command.challenge_id, "name": command.name, "set": True}
            case UnsetEnv():
                if not await self._store.remove_env(command.challenge_id, command.name):
                    raise EnvRefused("not_found", f"{command.challenge_id} was not given {command.name!r}")
                return {"challenge_id": command.challenge_id, "name": command.name, "set": False}
            case ListEnv():
                rows = await self._store.env(command.challenge_id)
                return {"env": [_shown(record) for record in rows]}

    async def _set(self, command: SetEnv) -> None:
        if not _NAME.fullmatch(command.name):
            raise EnvRefused("bad_name", f"expected letters, digits and _, got {command.name[:80]!r}")
        if "\0" in command.value or len(_utf8(command.value)) > MAX_VALUE:
            raise EnvRefused("bad_value", f"{command.name}: expected at most {MAX_VALUE} bytes without NUL")
        names = {record.name for record in await self._store.env(command.challenge_id)}
        if len(names | {command.name}) > MAX_NAMES:
            raise EnvRefused("too_many", f"expected at most {MAX_NAMES} variables of one challenge")
        unsealed = EnvRecord(
            challenge_id=command.challenge_id,
            name=command.name,
            repository=_same_form(command.repository),
            sealed=b"",
            given_at=self._clock.now(),
        )
        sealed = self._keyring.seal(_utf8(command.value), _context(unsealed))
        await self._store.put_env(
            EnvRecord(unsealed.challenge_id, unsealed.name, unsealed.repository, sealed, unsealed.given_at)
        )


def _utf8(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise EnvRefused("bad_value", "expected text that is UTF-8") from None


def _same_form(repository: str) -> str:
    """`owner/name` and its URL are one repository."""
    try:
        return repository_url(repository, {"ssh", "file"})
    except SourceError:
        return repository


def _context(record: EnvRecord) -> bytes:
    return _CONTEXT + canonical_json([record.challenge_id, record.repository, record.name])


def _shown(record: EnvRecord) -> dict[str, str]:
    return {
        "challenge_id": record.challenge_id,
        "name": record.name,
        "repository": record.repository,
        "given_at": record.given_at.isoformat().replace("+00:00", "Z"),
    }
