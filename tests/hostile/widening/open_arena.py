"""The arena with guards of the SDK that can be widened: the one that a submission's file `widen` names.

Part of a control challenge's tree, beside the arena's own module; it runs in the CVM and patches the SDK
that it was given.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Untyped on purpose: their attributes are replaced.
contained: Any = importlib.import_module("platform_challenge_sdk.contained")
context: Any = importlib.import_module("platform_challenge_sdk.context")
job: Any = importlib.import_module("platform_challenge_sdk.job")
recipe: Any = importlib.import_module("platform_challenge_sdk.recipe")
seccomp: Any = importlib.import_module("platform_challenge_sdk.seccomp")
submission: Any = importlib.import_module("platform_challenge_sdk.submission")
MIB = 1024 * 1024
STAGE: Path = contained._STAGE
RUN = submission.run_contained
ARGUMENTS, RLIMITS = recipe.Order.arguments, recipe.Order.rlimits


def edited(*changes: tuple[str, str]) -> Path:
    """A copy of the stage with some of its text replaced; what is not found there is an error."""
    text = STAGE.read_text()
    for old, new in changes:
        if old not in text:
            raise LookupError(f"the stage has no {old!r} any more: the control must be written anew")
        text = text.replace(old, new)
    copy = Path(tempfile.mkdtemp()) / "stage.py"
    copy.write_text(text)
    return copy


def arguments(change: Callable[[list[str]], list[str]]) -> None:
    """Change the arguments of bubblewrap."""
    recipe.Order.arguments = lambda self, *given: change(ARGUMENTS(self, *given))


def without(word: str) -> Callable[[list[str]], list[str]]:
    """Without one argument."""
    return lambda words: [one for one in words if one != word]


def capable(words: list[str]) -> list[str]:
    """All capabilities over what it has of its own."""
    words = ["0" if word == "1000" else word for word in words if word != "--disable-userns"]
    at = words.index("--cap-drop")
    return [*words[:at], "--cap-add", "ALL", *words[at + 2 :]]


def with_environment(words: list[str]) -> list[str]:
    """The SDK's own environment."""
    at = words.index("--clearenv") + 1
    given = [word for name, value in os.environ.items() for word in ("--setenv", name, value)]
    return words[:at] + given + words[at:]


def widen(guard: str, order: Any) -> Any:  # noqa: PLR0912 - a case for each guard
    """Widen one guard, for the rest of this CVM's only job."""
    match guard:
        case "processes of a run":
            recipe.Order.rlimits = lambda self: RLIMITS(self) | {"NPROC": 450}
        case "memory of a run":
            return replace(order, memory=1024 * MIB, address_space=1024 * MIB)
        case "disk of a run":
            return replace(order, disk=700 * MIB, memory=1024 * MIB)
        case "size of a file":
            recipe.Order.rlimits = lambda self: {
                name: most for name, most in RLIMITS(self).items() if name != "FSIZE"
            }
        case "files of a run":
            contained._STAGE = edited(("_INODES = 20_000", "_INODES = 4_000_000"))
            return replace(order, disk=700 * MIB)
        case "time of a run":
            return replace(order, timeout=15)
        case "a kill that cannot be ignored":
            contained._GRACE = 8.0
            contained._STAGE = edited(
                ("os.kill(child, signal.SIGKILL)", "os.kill(_family()[-1], signal.SIGTERM)")
            )
        case "the end of the whole tree":
            contained._STAGE = edited(
                ('_checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")', "pass"),
                ("        self._reap_all()\n", ""),
            )
            arguments(without("--unshare-pid"))
        case "network of its own":
            arguments(without("--unshare-net"))
        case "output of a run":
            return replace(order, output=200 * MIB)
        case "text that is no UTF-8":
            contained.Outcome.text = property(lambda self: self.stdout.decode("utf-8", "surrogateescape"))
            context.wire_text = lambda text, limit: text[:limit]
        case "environment":
            arguments(with_environment)
        case "control socket":
            contained._STAGE = edited(
                ("os.set_inheritable(control, False)", "os.set_inheritable(control, True)")
            )
        case "what a handler may return":
            job.check_result = lambda returned, most: returned
        case "capabilities":
            arguments(capable)
        case "families of sockets":
            seccomp._UNIX = 40
        case _:
            pass  # one of the validator's or the VMM's
    return order


def run_contained(order: Any, *given: Any) -> Any:
    """The SDK's, with a guard widened."""
    guard = (order.submission / "widen").read_text()
    if guard == "a sandbox of its own":
        done = subprocess.run(order.argv, cwd=order.submission, capture_output=True, timeout=10, check=False)
        return contained.Outcome(done.returncode, done.stdout, done.stderr, None, contained.Usage(0, 0, 0))
    return RUN(widen(guard, order), *given)


submission.run_contained = run_contained
importlib.import_module("arena")
