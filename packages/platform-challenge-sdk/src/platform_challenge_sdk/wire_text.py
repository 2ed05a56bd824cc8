"""Text that may come from a submission, made fit for the wire."""

from __future__ import annotations


def wire_text(text: str, limit: int) -> str:
    """At most `limit` characters, with lone surrogates (undecodable file names) replaced by `?`."""
    return text[:limit].encode("utf-8", "replace").decode()
