"""The root of every error that the protocol raises on purpose."""

from __future__ import annotations


class ProtocolError(Exception):
    """What came over a wire, or was about to go over one, is not what the protocol says."""
