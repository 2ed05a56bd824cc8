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
from platform_vmm.rootfs.image import GuestImage, build_guest_image, newest_image
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
        Path | None,
        typer.Option(help="Also write the OCI layout there, into a new folder"),
    ] = None,
    update: Annotated[bool, typer.Option(help="Take the newest packages, not the last build's")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the image where it is not there yet."""
    begun = time.monotonic()

    def tell(text: str) -> None:
        print(f"image: {time.monotonic() - begun:5.1f} s  {text}", file=sys.stderr)

    try:
        if output is not None and output.exists():
            raise VmmError(f"--output: {output} is there already: remove it or name another folder")
        image = build_guest_image(StateDirectory(state_dir).path, tell, update=update)
        if output is not None:
            shutil.copytree(image.layout, output)
    except (VmmError, OSError) as error:
        _fail(error)
    _tell(image, as_json=as_json, output=output)


@app.command()
def show(*, state_dir: State = Path("./platform-vmm"), as_json: AsJson = False) -> None:
    """Show what the newest image is made of; build nothing."""
    try:
        image = newest_image(StateDirectory(state_dir).path)
    except VmmError as error:
        _fail(error)
    _tell(image, as_json=as_json, output=None)


def _tell(image: GuestImage, *, as_json: bool, output: Path | None) -> None:
    layout = read_layout(output or image.layout)
    made_of = image.manifest
    if as_json:
        document: dict[str, Any] = {
            "digest": layout.digest,
            "path": str(image.path),
            "layout": str(output or image.layout),
            "bytes": layout.size,
            "layers": len(layout.layers),
            "packages": len(made_of["packages"]),
            "kernel": made_of["kernel"]["version"],
        }
        print(json.dumps(document))
        return
    print(f"platform-runtime@{layout.digest}")
    count, size = len(made_of["packages"]), layout.size / 1e6
    print(f"  {count} packages of Debian {made_of['suite']}, {size:.1f} MB packed")
    print(f"  kernel {made_of['kernel']['name']} {made_of['kernel']['version']} (not in the OCI image)")
    print(f"  OCI image layout: {output or image.layout}")


def _fail(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(2) from None
