"""Entry point of the process: `python -m platform_validator.egress FD`, started by the daemon."""

from __future__ import annotations

import sys

from platform_validator.egress.process import main

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
