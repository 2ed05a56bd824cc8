"""Start of a sandbox to its program's end, beside bare bubblewrap with the same program, in turn."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from platform_vmm.sandbox.cgroups import ControlGroups
from platform_vmm.sandbox.driver import SandboxDriver
from platform_vmm.sandbox.recipe import MIB, Recipe

_BARE = [
    "bwrap",
    "--unshare-all",
    "--die-with-parent",
    "--ro-bind",
    "/usr",
    "/usr",
    "--symlink",
    "usr/bin",
    "/bin",
]
_BARE += [
    "--symlink",
    "usr/lib",
    "/lib",
    "--symlink",
    "usr/lib64",
    "/lib64",
    "--proc",
    "/proc",
    "--dev",
    "/dev",
]


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs: int = parser.parse_args().runs
    ours: list[float] = []
    bare: list[float] = []
    groups = ControlGroups(f"platform-vmm-bench-{os.getpid()}")
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "shared"
        shared.mkdir()
        (shared / "dstack.sock").touch()
        driver = SandboxDriver(groups)
        for _ in range(runs):
            bare.append(_bare())
            ours.append(await _ours(driver, Path(folder), shared))
    groups.close()
    ratios = [one / other for one, other in zip(ours, bare, strict=True)]
    print(f"{'what':<28}{'p50 ms':>9}{'min':>9}{'max':>9}")
    for name, values in (("sandbox: start to exit", ours), ("bare bubblewrap", bare)):
        shown = (statistics.median(values), min(values), max(values))
        print(f"{name:<28}" + "".join(f"{value * 1000:>9.1f}" for value in shown))
    report = {
        "runs": runs,
        "sandbox_ms_p50": round(statistics.median(ours) * 1000, 1),
        "bare_bubblewrap_ms_p50": round(statistics.median(bare) * 1000, 1),
        "ratio_p50": round(statistics.median(ratios), 2),
    }
    print(json.dumps(report))


def _bare() -> float:
    began = time.perf_counter()
    subprocess.run([*_BARE, "true"], check=True, timeout=30)
    return time.perf_counter() - began


async def _ours(driver: SandboxDriver, folder: Path, shared: Path) -> float:
    recipe = Recipe(
        command=["true"],
        environment={"PATH": "/usr/bin:/bin"},
        image=folder,
        shared=shared,
        memory_bytes=64 * MIB,
        disk_bytes=16 * MIB,
        cpus=1,
        pids=32,
        ports=[18080],
    )
    uid = 300_950 if os.getuid() == 0 else os.getuid()
    began = time.perf_counter()
    sandbox = await driver.start("bench", recipe, uid=uid, log=folder / "log", forwards=[])
    await sandbox.exited()
    took = time.perf_counter() - began
    await sandbox.destroy()
    return took


if __name__ == "__main__":
    asyncio.run(main())
