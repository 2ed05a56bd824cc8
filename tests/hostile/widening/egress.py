"""The egress proxy's process with guards that can be widened: `python egress.py FILE FD`.

Started by the validator of the controls with an empty environment, so that it is told by its arguments.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.hostile.widening import FILE, replace_in, widened

from platform_validator.egress import server
from platform_validator.egress.addresses import Dialable
from platform_validator.egress.process import main


def _check_target(original: Any) -> Any:
    def check_target(target: Any, grant: Any) -> None:
        if widened("hosts of the policy"):
            grant = replace(grant, hosts=(target.host,))
        if widened("ports of the policy"):
            grant = replace(grant, ports=(target.port,))
        original(target, grant)

    return check_target


def _dialable(original: Any) -> Any:
    def dialable(found: Any, **named: Any) -> Any:
        return Dialable(tuple(found)) if widened("public addresses") else original(found, **named)

    return dialable


if __name__ == "__main__":
    os.environ[FILE] = sys.argv[1]
    replace_in(server, "check_target", _check_target)
    replace_in(server, "dialable", _dialable)
    sys.exit(main(int(sys.argv[2])))
