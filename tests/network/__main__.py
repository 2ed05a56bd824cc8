"""The proxy as a program: `python -m tests.network --upstream 127.0.0.1:8080`.

It prints where it listens, then obeys its standard input a line at a time: the toxics in force from then
on (`latency seconds=0.5 jitter=0.1 + slicer size=1`), behind `upstream:` or `downstream:` for one direction
only; `clear` for none. It ends with its input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields

from tests.network.proxy import TcpProxy
from tests.network.toxics import (
    BOTH,
    Bandwidth,
    BlackHole,
    Direction,
    Down,
    Latency,
    Limit,
    Reset,
    Slicer,
    Toxic,
)

_KINDS: dict[str, type[Toxic]] = {
    "latency": Latency,
    "down": Down,
    "black_hole": BlackHole,
    "reset": Reset,
    "slicer": Slicer,
    "bandwidth": Bandwidth,
    "limit": Limit,
}


class BadOrder(ValueError):
    """A line that names no toxic, or not as it is made."""


def parse(line: str) -> tuple[tuple[Toxic, ...], tuple[Direction, ...]]:
    """What a line asks for.

    Raises:
        BadOrder: It cannot be read.
    """
    directions: tuple[Direction, ...] = BOTH
    head, colon, rest = line.partition(":")
    if colon:
        named = [each for each in BOTH if each.value == head.strip()]
        if not named:
            raise BadOrder(f"expected upstream: or downstream:, got {head.strip()!r}")
        directions, line = tuple(named), rest
    if line.strip() == "clear":
        return (), directions
    return tuple(_toxic(each.split()) for each in line.split("+")), directions


def _toxic(words: list[str]) -> Toxic:
    if not words or words[0] not in _KINDS:
        raise BadOrder(f"expected clear or one of {', '.join(_KINDS)}, got {' '.join(words)!r}")
    kind = _KINDS[words[0]]
    asked = dict(word.partition("=")[::2] for word in words[1:])
    known = {each.name: int if "int" in str(each.type) else float for each in fields(kind)}
    needed = {each.name for each in fields(kind) if each.default is MISSING}
    if not needed <= asked.keys() <= known.keys():
        raise BadOrder(f"{words[0]}: expected {', '.join(known) or 'nothing'}, got {', '.join(asked)!r}")
    make: Callable[..., Toxic] = kind
    try:
        return make(**{name: known[name](value) for name, value in asked.items()})
    except ValueError as error:
        raise BadOrder(f"{words[0]}: {error}") from error


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"expected host:port, got {text!r}")
    return host, int(port)


def main() -> int:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m tests.network", description=__doc__)
    parser.add_argument("--upstream", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--listen", type=_address, default=("127.0.0.1", 0), metavar="HOST:PORT")
    asked = parser.parse_args()
    with TcpProxy(asked.upstream, asked.listen) as proxy:
        sys.stdout.write(f"listening on {proxy.address[0]}:{proxy.address[1]}\n")
        sys.stdout.flush()
        for line in sys.stdin:
            try:
                toxics, directions = parse(line)
            except BadOrder as error:
                answer = f"not done: {error}"
            else:
                proxy.set(*toxics, directions=directions)
                answer = "done"
            sys.stdout.write(answer + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
