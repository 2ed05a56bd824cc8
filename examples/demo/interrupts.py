"""Ends a command that was asked to end as its own end does: whatever it started is ended."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command's `main` and exit with its code: 130 after Ctrl-C, 143 after SIGTERM.

    A second SIGTERM does not cut the cleaning short: `make`, a shell and a service manager send it to each
    process of a group, and then to us once more.
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _terminated(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
