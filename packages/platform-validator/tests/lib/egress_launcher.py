"""Starts the product's egress proxy with a dialler that leads public addresses to listeners of the test.

Only the last step is replaced: names, addresses and everything that is refused are the product's. What is not
in the map cannot be connected to, so that no test reaches the internet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from platform_validator.egress import dialing, process
from platform_validator.egress.addresses import Address
from platform_validator.egress.dialing import Stream


def launch(leads: dict[str, int], tried: Path, descriptor: int) -> int:
    """Run it. `leads`: `address:port` to a port of the loopback; each try is a line in `tried`."""
    real = dialing.connect
    # Opened now: a moment later this process is nobody.
    log = tried.open("a", buffering=1)

    async def connect(address: Address, port: int) -> Stream:
        log.write(f"{address}:{port}\n")
        led = leads.get(f"{address}:{port}")
        if led is None:
            raise OSError(f"{address}:{port} is not of this test")
        return await real(type(address)("127.0.0.1"), led)

    dialing.connect = connect
    return process.main(descriptor)


if __name__ == "__main__":
    sys.exit(launch(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
