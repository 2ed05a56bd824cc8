"""What a CVM is told at its start, unmeasured and private to it: JSON with every key always present."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_protocol.ids import VmName

_SECRET_BYTES = 32


class UserConfig(BaseModel):
    """`launch_secret` is L, 32 random bytes made for this VM, base64url without padding.

    Never log it, nor `proxy_url`, whose password is made of it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    vm: VmName
    launch_secret: str = Field(repr=False)
    validator_base_url: str
    proxy_url: str | None = Field(repr=False)
    max_lifetime_s: Annotated[int, Field(gt=0)]
    hard_lifetime_s: Annotated[int, Field(gt=0)]
    filesystem: FilesystemPolicy = FilesystemPolicy()
    """For the VMM, which enforces it; a validator before it had none."""

    @field_validator("launch_secret")
    @classmethod
    def _is_32_bytes(cls, value: str) -> str:
        try:
            size = len(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)))
        except (binascii.Error, ValueError) as error:
            raise ValueError("expected base64url without padding") from error
        if size != _SECRET_BYTES:
            raise ValueError(f"expected {_SECRET_BYTES} bytes, got {size}")
        return value

    @property
    def secret(self) -> bytes:
        """L, 32 bytes."""
        return base64.urlsafe_b64decode(self.launch_secret + "=" * (-len(self.launch_secret) % 4))

    @staticmethod
    def encode_secret(secret: bytes) -> str:
        """L as the wire has it."""
        return base64.urlsafe_b64encode(secret).rstrip(b"=").decode("ascii")
