"""The validator as it is, but that its egress proxy's last step leads to listeners of the test.

The proxy is the product's own process: `egress_launcher` replaces the connection to an address that was
resolved, judged and chosen, and nothing before it.
"""

from __future__ import annotations

import functools
import sys

from platform_validator.cli import main
from platform_validator.daemon import parts
from platform_validator.egress.supervisor import EgressSupervisor

if __name__ == "__main__":
    launcher, leads, tried, *words = sys.argv[1:]
    command = (sys.executable, launcher, leads, tried)
    vars(parts)["EgressSupervisor"] = functools.partial(EgressSupervisor, command=command)
    sys.argv = ["validator", *words]
    main()
