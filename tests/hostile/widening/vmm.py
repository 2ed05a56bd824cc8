"""`platform-vmm` with guards that can be widened."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.hostile.widening import argument, replace_in, widened

from platform_vmm import boot, cli
from platform_vmm.sandbox import driver, recipe

_STAGE = driver.STAGE
_MORE_MEMORY = 1024 * 1024 * 1024
_MORE_PROCESSES = 900
_MORE_CONSOLE = 64 * 1024 * 1024
_MORE_CONNECTIONS = 4000


def _shared_network() -> Path:
    """A copy of the stage that makes no network namespace; what is not found in its text is an error."""
    text = _STAGE.read_text()
    for old, new in (
        ("CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS", "CLONE_NEWUSER | CLONE_NEWNS"),
        ('(("lo:0", GUEST), ("lo:1", HOST))', "()"),
        ('write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")', "pass"),
    ):
        if old not in text:
            raise LookupError(f"{_STAGE} has no {old!r} any more: the control must be written anew")
        text = text.replace(old, new)
    copy = Path(tempfile.mkdtemp(prefix="hostile-stage-", dir=os.environ["HOSTILE_SCRATCH"])) / _STAGE.name
    copy.write_text(text)
    return copy


def _recipe(original: Any) -> Any:
    def decided(self: Any, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if widened("processes of a VM"):
            return replace(found, pids=_MORE_PROCESSES)
        if widened("memory of a VM"):
            return replace(found, memory_bytes=found.memory_bytes + _MORE_MEMORY)
        return found

    return decided


def _spawn(original: Any) -> Any:
    made: dict[int, tuple[Any, Any]] = {}

    async def spawn(self: Any, *arguments: Any, **named: Any) -> Any:
        nft, guest_filter = made.setdefault(id(self), (self._nft, self._filter))
        shared = widened("network of a VM")
        self._nft = None if shared else nft
        self._filter = None if widened("system calls of a VM") else guest_filter
        driver.STAGE = _shared_network() if shared else _STAGE
        return await original(self, *arguments, **named)

    return spawn


def _destroy(original: Any) -> Any:
    async def destroy(self: Any) -> None:
        if widened("no path of a guest's"):
            _read_report(self.name)
        await original(self)

    return destroy


def _read_report(name: str) -> None:
    """As a careless VMM would: open what a guest wrote, by its path."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name in (process / "cgroup").read_text():
                (process / "root/data/report").read_bytes()


def _bwrap_arguments(original: Any) -> Any:
    def arguments(self: Any, **named: Any) -> list[str]:
        words: list[str] = original(self, **named)
        if widened("files of the host"):
            end = words.index("--proc")
            words[end:end] = ["--ro-bind", argument(), "/host"]
        return words

    return arguments


def main() -> None:
    """Replace, and begin."""
    replace_in(boot.Boot, "_recipe", _recipe)
    replace_in(driver.SandboxDriver, "_spawn", _spawn)
    replace_in(driver.Sandbox, "destroy", _destroy)
    replace_in(recipe.Recipe, "bwrap_arguments", _bwrap_arguments)
    replace_in(
        driver,
        "Console",
        lambda console: lambda path: console(path, _MORE_CONSOLE) if widened("console") else console(path),
    )
    replace_in(
        driver,
        "Relay",
        lambda relay: lambda to: relay(to, _MORE_CONNECTIONS) if widened("connections") else relay(to),
    )
    cli.main()


if __name__ == "__main__":
    main()
