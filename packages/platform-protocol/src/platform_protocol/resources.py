"""What a job or a CVM needs of a machine."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Resources(BaseModel):
    """`{cpu_cores, memory_mb, disk_mb, gpu_count}`: always these four integers on our wires."""

    model_config = ConfigDict(frozen=True)

    cpu_cores: Count
    memory_mb: Count
    disk_mb: Count
    gpu_count: Count = 0
