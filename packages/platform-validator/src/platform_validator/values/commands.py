"""What an operator does with values: the same through a running daemon and without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from platform_protocol.ids import ChallengeId
from platform_protocol.values import ValueInvalid, checked_key, value_text
from platform_validator.values.errors import ValueRefused
from platform_validator.values.keeper import ValueKeeper
from platform_validator.values.manager import ChallengeValues, DynamicValuesManager

FORMAT = "platform-values-v1"


class _Command(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShowScopes(_Command):
    """Which challenges keep values, and how much."""

    do: Literal["scopes"] = "scopes"


class ListValues(_Command):
    """Keys and versions; no values."""

    do: Literal["list"] = "list"
    challenge_id: ChallengeId
    prefix: str = ""


class GetValue(_Command):
    """One value."""

    do: Literal["get"] = "get"
    challenge_id: ChallengeId
    key: str


class SetValue(_Command):
    """Write one value."""

    do: Literal["set"] = "set"
    challenge_id: ChallengeId
    key: str
    value: Any


class DeleteValue(_Command):
    """Remove one value."""

    do: Literal["delete"] = "delete"
    challenge_id: ChallengeId
    key: str


class ExportValues(_Command):
    """Every value of a challenge, in clear."""

    do: Literal["export"] = "export"
    challenge_id: ChallengeId


class ImportValues(_Command):
    """Write many values; what is not among them stays."""

    do: Literal["import"] = "import"
    challenge_id: ChallengeId
    values: dict[str, Any]


class RekeyValues(_Command):
    """Seal everything under a new key."""

    do: Literal["rekey"] = "rekey"


ValueCommand = (
    ShowScopes | ListValues | GetValue | SetValue | DeleteValue | ExportValues | ImportValues | RekeyValues
)


async def perform(keeper: ValueKeeper, command: ValueCommand) -> dict[str, Any]:
    """Do it, and say what came of it.

    Raises:
        ValueRefused: Not found, a limit, or a value that cannot be kept; `code` says which.
        ValueInvalid: A key or value that is none.
        ValueUnreadable: A value does not open.
        ValueKeysUnusable: No new key can be had.
        StoreUnavailable: The journal cannot be read or written.
    """
    match command:
        case ShowScopes() | ListValues() | GetValue() | ExportValues():
            return await _read(keeper.manager, command)
        case _:
            return await _change(keeper, command)


async def _read(
    values: DynamicValuesManager, command: ShowScopes | ListValues | GetValue | ExportValues
) -> dict[str, Any]:
    match command:
        case ShowScopes():
            return {"challenges": [asdict(each) for each in await values.used()]}
        case ListValues():
            entries = await values.entries(command.challenge_id, command.prefix)
            return {"values": [{"key": each.key, "version": each.version} for each in entries]}
        case GetValue():
            value, version = await values.for_challenge(command.challenge_id).get_versioned(command.key)
            if not version:
                raise ValueRefused("not_found", f"challenge {command.challenge_id} keeps no {command.key!r}")
            return {"key": command.key, "value": value, "version": version}
        case ExportValues():
            entries = await values.entries(command.challenge_id)
            kept = {each.key: each.value for each in entries}
            return {"format": FORMAT, "challenge_id": command.challenge_id, "values": kept}


async def _change(
    keeper: ValueKeeper, command: SetValue | DeleteValue | ImportValues | RekeyValues
) -> dict[str, Any]:
    match command:
        case SetValue():
            mine = keeper.manager.for_challenge(command.challenge_id)
            return {"key": command.key, "version": await mine.set(command.key, command.value)}
        case DeleteValue():
            await keeper.manager.for_challenge(command.challenge_id).delete(command.key)
            return {"key": command.key, "deleted": True}
        case ImportValues():
            mine = keeper.manager.for_challenge(command.challenge_id)
            return {"written": await _import(mine, command.values)}
        case RekeyValues():
            resealed = await keeper.rekey()
            return {"resealed": resealed.done, "unreadable": resealed.left}


async def _import(mine: ChallengeValues, values: Mapping[str, Any]) -> int:
    """Everything is looked at before the first is written; a limit in the middle says how far it came."""
    for key, value in values.items():
        try:
            checked_key(key)
            value_text(value)
        except ValueInvalid as error:
            raise ValueRefused(error.code, f"{key[:80]!r}: {error}; nothing was written") from error
    for written, (key, value) in enumerate(values.items()):
        try:
            await mine.set(key, value)
        except ValueRefused as error:
            said = f"{key[:80]!r}: {error}; {written} of {len(values)} are written, again is safe"
            raise ValueRefused(error.code, said) from error
    return len(values)
