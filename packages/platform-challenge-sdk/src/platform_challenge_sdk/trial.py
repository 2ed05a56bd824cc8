"""Finds out how submissions can be contained here, by really doing it, once."""

from __future__ import annotations

import os
import platform
import tempfile
import threading
from pathlib import Path

from platform_challenge_sdk import landlock
from platform_challenge_sdk.contained import MIB, NOT_RUN, Order, run_contained
from platform_challenge_sdk.containment import NAMESPACES, Containment, Facts, choose
from platform_challenge_sdk.errors import ContainmentUnavailable

_TIMEOUT = 30.0
_MEMORY, _DISK = 128 * MIB, MIB
_HELD = 0
_TRIAL = """
if true 2>/dev/null < "$1"; then echo it reads files of the SDK; exit 1; fi
case "$2" in
    none) if [ $$ -gt 2 ]; then echo it has no pid namespace; exit 1; fi;;
    *) if kill -0 "$2" 2>/dev/null; then echo it signals the SDK; exit 1; fi;;
esac
true > "$HOME/x" || { echo it cannot write; exit 1; }
"""


class _Choice:
    """Made once: what is found first stays, so that no submission can bring about a weaker one."""

    lock = threading.Lock()
    """Guards the trial: two at once would be one too many."""
    made: Containment | None = None


def containment() -> Containment:
    """How submissions are contained here. Blocks for the first trial; call it in a worker thread.

    Raises:
        ContainmentUnavailable: They cannot be, with the reasons.
    """
    with _Choice.lock:
        if _Choice.made is None:
            _Choice.made = choose(find_facts())
        return _Choice.made


def find_facts() -> Facts:
    """Try each kind, the strongest first, until one holds."""
    machine, root, known = platform.machine(), os.geteuid() == 0, landlock.version()
    namespaces = _fault_of(NAMESPACES)
    own_uid = same_uid = "not tried"
    # Without a fence around signals the end of a run under our own uid would end everything that has it.
    if namespaces is None or known == 0 or (not root and known < landlock.SIGNALS):
        return Facts(machine, root, namespaces, own_uid, same_uid, known)
    if root:
        return Facts(
            machine, root, namespaces, _fault_of(Containment("landlock", True, known)), same_uid, known
        )
    return Facts(machine, root, namespaces, own_uid, _fault_of(Containment("landlock", False, known)), known)


def _fault_of(kind: Containment) -> str | None:
    """Why a submission is not held so; None: a trial run was."""
    with tempfile.TemporaryDirectory(prefix="trial-") as made:
        folder = Path(made)
        secret, submission = folder / "secret", folder / "submission"
        secret.write_text("secret")
        submission.mkdir()
        for path, mode in ((folder, 0o755), (secret, 0o644), (submission, 0o755)):
            path.chmod(mode)
        # In a pid namespace of its own our number is somebody else's, perhaps its own.
        ours = "none" if kind.kind == "namespaces" else str(os.getpid())
        argv = ["sh", "-c", _TRIAL, "sh", str(secret), ours]
        try:
            outcome = run_contained(Order(argv, submission, b"", _TIMEOUT, _MEMORY, {}, _DISK), (), kind)
        except (ContainmentUnavailable, ValueError) as error:
            return str(error).removeprefix(NOT_RUN).removeprefix("failed: ")
    if outcome.exit == _HELD and outcome.killed_by is None:
        return None
    told = (outcome.text + outcome.stderr.decode("utf-8", "replace")).strip()[-300:]
    return f"a trial run ended with {outcome.killed_by or outcome.exit}: {told or 'no output'}"
