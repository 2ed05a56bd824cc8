"""The VMM port over dstack's pRPC: tolerant of every version from v0.5.2 to the head of August 2026."""

from platform_validator.cvm.dstack.client import DstackVmm
from platform_validator.cvm.dstack.refusals import refusal

__all__ = ["DstackVmm", "refusal"]
