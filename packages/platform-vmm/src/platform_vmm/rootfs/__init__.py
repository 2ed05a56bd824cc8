"""The root filesystem that guests boot from, made of Debian packages and the SDK."""

from __future__ import annotations

from platform_vmm.rootfs.image import GuestImage, build_guest_image, prune_guest_images

__all__ = ["GuestImage", "build_guest_image", "prune_guest_images"]
