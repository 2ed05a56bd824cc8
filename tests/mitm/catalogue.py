"""Every attack by its name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.mitm import frames, handshakes
from tests.mitm.attack import Attack

RELAY, CUT_OFF = "relay", "cut in the middle"


def catalogue() -> dict[str, Callable[..., Attack]]:
    """Name to what makes it; `old` and `known_secret` are still wanted."""
    made: dict[str, Callable[..., Attack]] = {RELAY: Attack, CUT_OFF: frames.CutOff}
    for where, up in (("to the guest", True), ("to the validator", False)):
        for name, kind in (
            ("replay", frames.Replay),
            ("replay of an older connection", frames.ReplayOld),
            ("reorder", frames.Reorder),
            ("drop", frames.Drop),
        ):
            made[f"{name}, {where}"] = partial(kind, up)
        for change in ("truncate", "empty"):
            made[f"{change}, {where}"] = partial(frames.Changed, up, change)
        for place in ("first", "middle", "last"):
            made[f"bit flip {place}, {where}"] = partial(frames.Changed, up, place)
    made["reflect the validator's"] = partial(frames.Reflect, True)
    made["reflect the guest's"] = partial(frames.Reflect, False)
    for name, both in (("validator's", (True, False)), ("guest's", (False, True)), ("both", (True, True))):
        made[f"key swap, {name}"] = partial(handshakes.SwapKeys, *both)
    for field in ("nonce", "validator", "session_id", "resume", "auth"):
        made[f"handshake edit, {field}"] = partial(handshakes.Edit, True, field)
    for field in ("vm", "quote", "event_log", "vm_config"):
        made[f"handshake edit, {field}"] = partial(handshakes.Edit, False, field)
    return made | {
        "handshake replay, to the guest": handshakes.ReplayHandshakeToGuest,
        "handshake replay, to the validator": handshakes.ReplayHandshakeToValidator,
        "downgrade, the offer": partial(handshakes.Edit, True, "versions"),
        "downgrade, the answer": partial(handshakes.Edit, False, "version"),
        "downgrade, played by himself": handshakes.PlayOldGuest,
        "second dialler": partial(handshakes.SecondDialler, knows=False),
        "second dialler with another VM's secret": partial(handshakes.SecondDialler, knows=True),
        "another CVM of the app": partial(handshakes.OtherCvm, rewrites=False),
        "another CVM of the app, its secret known": partial(handshakes.OtherCvm, rewrites=True),
        "a twin at the resume": handshakes.TwinAtResume,
    }


SHORT = (
    RELAY,
    "replay, to the guest",
    "reorder, to the validator",
    "bit flip last, to the validator",
    "key swap, both",
    "handshake replay, to the guest",
    "downgrade, played by himself",
    "another CVM of the app, its secret known",
    "a twin at the resume",
)
"""One of each kind: what `make test` runs."""
