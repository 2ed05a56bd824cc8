"""The operator's filesystem policy, as CreateVm's user_config brings it for the VMM to enforce."""

from __future__ import annotations

import json

from pydantic import ValidationError

from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_vmm.errors import VmmError


def read_filesystem_policy(user_config: str) -> FilesystemPolicy:
    """The key `filesystem`; the strict default where there is none.

    Raises:
        VmmError: It is there and cannot be kept: a guest with less than was asked for is not started.
    """
    try:
        found = json.loads(user_config)
    except (ValueError, RecursionError):
        return FilesystemPolicy()
    if not isinstance(found, dict) or "filesystem" not in found:
        return FilesystemPolicy()
    try:
        return FilesystemPolicy.model_validate(found["filesystem"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise VmmError(f"user_config: filesystem{f'.{where}' if where else ''}: {first['msg']}") from None
