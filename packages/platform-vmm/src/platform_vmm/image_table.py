"""The table of images that CreateVm can name: the driver that makes its guests, and its runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from platform_vmm.driver import GuestDriver
from platform_vmm.errors import ImageUnknown
from platform_vmm.images import RuntimeTable


@dataclass(frozen=True, slots=True)
class Image:
    """One image. `runtimes` is what the image of a compose file is looked up in."""

    name: str
    driver: GuestDriver
    runtimes: RuntimeTable

    def description(self) -> dict[str, Any]:
        """What ListImages tells of it, as JSON."""
        return {
            "isolation_level": self.driver.level,
            "runtimes": self.runtimes.digests(),
            "local": True,
            "note": self.driver.note,
            "weaker": self.driver.weaker,
        }


class ImageTable:
    """Images by name."""

    def __init__(self, images: list[Image]) -> None:
        self._images = {image.name: image for image in images}

    def add(self, image: Image) -> None:
        """One more."""
        self._images[image.name] = image

    def __iter__(self) -> Iterator[Image]:
        return iter(self._images.values())

    def find(self, name: str) -> Image:
        """The image of that name.

        Raises:
            ImageUnknown: There is none.
        """
        image = self._images.get(name)
        if image is None:
            raise ImageUnknown(
                f"Failed to load image: {name!r} is not here; the local VMM has {', '.join(self._images)}"
            )
        return image
