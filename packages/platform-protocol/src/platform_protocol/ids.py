"""Identifiers that must not be mixed. All are strings on the wire."""

from __future__ import annotations

from typing import NewType

JobId = NewType("JobId", str)
ChallengeId = NewType("ChallengeId", str)
SubmissionId = NewType("SubmissionId", str)
ClaimId = NewType("ClaimId", str)
LeaseToken = NewType("LeaseToken", str)
VmName = NewType("VmName", str)
VmId = NewType("VmId", str)
Hotkey = NewType("Hotkey", str)
"""An SS58 address, prefix 42."""
