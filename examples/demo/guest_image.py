"""The image that virtual machines boot from, for the VMM of a run: made once, kept in the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from examples.demo.processes import DemoFailed

_BIN = Path(sys.executable).parent
_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "platform-vmm"
_PATIENCE_S = 900.0


def offer_guest_image(vmm: Path) -> None:
    """Make the image where it is not there yet, with progress, and give it to a VMM's state directory.

    Raises:
        DemoFailed: It cannot be made; `platform-vmm image build` has said why.
    """
    _CACHE.mkdir(parents=True, exist_ok=True)
    command = [str(_BIN / "platform-vmm"), "image", "build", "--state-dir", str(_CACHE)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=_PATIENCE_S, check=False)
    if done.returncode != 0:
        raise DemoFailed("the image of virtual machines could not be made")
    images = vmm / "images"
    images.mkdir(mode=0o711, parents=True)
    (images / "guest").symlink_to(_CACHE / "images" / "guest")
