"""What a new configuration would change in a running daemon: decided purely, carried out elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

from platform_validator.config import OPTIONS, ConfigFaults, Settings
from platform_validator.config.settings import Option
from platform_validator.telemetry.logging import BadDirectives, Directives

_WHY = (
    ("validator.hotkey", "every request of this run is signed with its key"),
    ("keys.", "every request of this run is signed with its key"),
    ("validator.db_path", "its state directory is locked and its journal open"),
    ("validator.base_url", "CVMs that run were told it"),
    ("validator.", "the listener is bound"),
    ("platform.", "claims that are held belong to that Platform API"),
    ("vmm", "CVMs that run were made there, and their ports counted"),
    ("dstack.", "CVMs that run were made there, and their ports counted"),
    ("sources.", "challenges that are Active were fetched under it"),
    ("cvm.", "challenges that are Active were resolved with it"),
    ("sandbox_config.resource_monitoring", "the loop that samples begins with a start"),
    ("sandbox_config.", "CVMs that run were admitted under it"),
    ("egress.", "the egress proxy runs, and CVMs that run were told where"),
    ("attestation.", "CVMs that run were admitted under it"),
    ("values.", "values are open under the key and the limits of this start"),
    ("scoring_config.", "the jobs of one run are scored alike"),
)
_LATER = "it is read, and not in force yet"


@dataclass(frozen=True, slots=True)
class Change:
    """A setting's values before and after, as they were written; secrets are not shown."""

    setting: str
    old: object
    new: object
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Reload:
    """What a reload does.

    Attributes:
        applied: Comes into force now.
        restart: Waits for a restart; each says why.
        invalid: What is wrong with the new configuration; then nothing is applied.
        settings: What is in force afterwards.
    """

    settings: Settings = field(repr=False)
    applied: tuple[Change, ...] = ()
    restart: tuple[Change, ...] = ()
    invalid: tuple[str, ...] = ()


def plan_reload(old: Settings, new: Settings | ConfigFaults) -> Reload:
    """What becomes of a configuration that was read anew; `old` is what is in force."""
    # 1. Something is wrong with it: nothing is applied.
    if isinstance(new, ConfigFaults):
        return Reload(old, invalid=tuple(new.faults))
    try:
        Directives(new["validator.log"])
    except BadDirectives as error:
        return Reload(old, invalid=(f"validator.log ({new.origins['validator.log'].where}): {error}",))
    # 2. What can change while jobs run does; the rest keeps its value until a restart.
    changed = [option for option in OPTIONS if old[option.key] != new[option.key]]
    applied = tuple(_change(option, old, new) for option in changed if option.reloads)
    restart = tuple(_change(option, old, new, why(option)) for option in changed if not option.reloads)
    return Reload(old.taking(new, [change.setting for change in applied]), applied, restart)


def why(option: Option) -> str:
    """Why a setting that does not reload needs a restart."""
    if option.later:
        return _LATER
    return next(reason for prefix, reason in _WHY if option.key.startswith(prefix))


def _change(option: Option, old: Settings, new: Settings, reason: str = "") -> Change:
    return Change(option.key, _shown(option, old), _shown(option, new), reason)


def _shown(option: Option, settings: Settings) -> object:
    given = settings.origins[option.key].value
    return "(secret)" if option.secret and given is not None else given
