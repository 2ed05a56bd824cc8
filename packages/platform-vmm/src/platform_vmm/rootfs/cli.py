"""`platform-vmm image`: the root filesystem of guests, and the same as an OCI image for real dstack hosts."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from platform_vmm.errors import VmmError
from platform_vmm.rootfs.image import (
    GuestImage,
    build_guest_image,
    check_reproducible,
    newest_image,
    prune_guest_images,
)
from platform_vmm.rootfs.oci import read_layout
from platform_vmm.state import StateDirectory

app = typer.Typer(
    help="The image that guests of QEMU boot from, which is also the runtime image of dstack hosts.",
    no_args_is_help=True,
    add_completion=False,
)
State = Annotated[
    Path, typer.Option("--state-dir", envvar="PLATFORM_VMM_STATE", help="Where images and packages are kept")
]
AsJson = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout")]


@app.command()
def build(
    *,
    state_dir: State = Path("./platform-vmm"),
    output: Annotated[
        Path | None, typer.Option(help="Also write the OCI layout there, into a new folder")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="A platform-runtime.json: make exactly that image again")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Take the newest packages")] = False,
    check: Annotated[bool, typer.Option("--check", help="Make it a second time and compare")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Then remove every other image")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the image where it is not there yet."""
    begun = time.monotonic()

    def tell(text: str) -> None:
        print(f"image: {time.monotonic() - begun:5.1f} s  {text}", file=sys.stderr)

    try:
        if output is not None and output.exists():
            raise VmmError(f"--output: {output} is there already: remove it or name another folder")
        state = StateDirectory(state_dir).path
        image = build_guest_image(state, tell, like=like, update=update)
        if check:
            check_reproducible(state, image, tell)
        if prune:
            prune_guest_images(state, keep=image)
        if output is not None:
            shutil.copytree(image.layout, output)
            tell(f"to publish it: skopeo copy --preserve-digests oci:{output} docker://REGISTRY/NAME:TAG")
    except (VmmError, OSError) as error:
        _fail(error)
    more: dict[str, Any] = {"reproducible": True} if check else {}
    _tell(image, output, as_json=as_json, more=more | {"seconds": round(time.monotonic() - begun, 1)})


@app.command()
def show(*, state_dir: State = Path("./platform-vmm"), as_json: AsJson = False) -> None:
    """Show what the newest image is made of; build nothing."""
    try:
        _tell(newest_image(state_dir.absolute()), None, as_json=as_json, more={})
    except (VmmError, OSError) as error:
        _fail(error)


def _tell(image: GuestImage, output: Path | None, *, as_json: bool, more: dict[str, Any]) -> None:
    layout = read_layout(output or image.layout)
    made_of = image.manifest
    if as_json:
        document: dict[str, Any] = {
            "digest": layout.digest,
            "layers": len(layout.layers),
            "bytes": layout.size,
            "packages": len(made_of["packages"]),
            "kernel": made_of["kernel"]["version"],
            "layout": str(output or image.layout),
        }
        print(json.dumps(document | more))
        return
    print(f"platform-runtime@{layout.digest}")
    count, size = len(made_of["packages"]), layout.size / 1e6
    print(f"  {count} packages of Debian {made_of['suite']}, {size:.1f} MB packed")
    print(f"  kernel {made_of['kernel']['name']} {made_of['kernel']['version']} (not in the OCI image)")
    print(f"  OCI image layout: {output or image.layout}")


def _fail(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(2) from None
