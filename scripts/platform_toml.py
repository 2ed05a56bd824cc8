"""Writes what follows from platform.toml's schema: its JSON Schema, and the table in docs/challenges.md.

`python scripts/platform_toml.py` writes both; `--check` only says whether they are as they should be.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from platform_protocol.spec import ChallengeSpec

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "packages/platform-protocol/src/platform_protocol/platform-toml.schema.json"
PAGE = ROOT / "docs/challenges.md"
_TABLE = re.compile(r"(<!-- platform\.toml: .*? -->\n).*?(<!-- end -->)", re.DOTALL)


def schema_text() -> str:
    """The JSON Schema."""
    schema = ChallengeSpec.model_json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "platform.toml"}
    return json.dumps(head | {key: value for key, value in schema.items() if key != "title"}, indent=1) + "\n"


def table() -> str:
    """The table of keys."""
    schema = ChallengeSpec.model_json_schema()
    rows = ["| key | default | what it is |", "|---|---|---|"]
    for path, field in _fields(schema, schema, ()):
        default = field.get("default")
        shown = (
            "required"
            if "default" not in field
            else "unset"
            if default is None
            else f"`{json.dumps(default)}`"
        )
        rows.append(f"| `{'.'.join(path)}` | {shown} | {field['description'].replace('|', ' or ')} |")
    return "\n".join(rows) + "\n"


def _fields(
    schema: dict[str, Any], table: dict[str, Any], path: tuple[str, ...]
) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    found = []
    for name, field in table["properties"].items():
        named = next(iter(field.get("patternProperties", {}).values()), {})  # [env.NAME]
        reference = field.get("$ref") or named.get("$ref")
        if reference is not None:
            inner = schema["$defs"][reference.rpartition("/")[2]]
            found += _fields(schema, inner, (*path, name, *(("NAME",) if named else ())))
        else:
            empty: dict[str, Any] = {"array": [], "object": {}}
            lists = field.get("type") in empty
            found.append(((*path, name), {**field, "default": empty[field["type"]]} if lists else field))
    return found


def wanted() -> dict[Path, str]:
    """Each file with the text that it should have."""
    page = PAGE.read_text(encoding="utf-8")
    return {SCHEMA: schema_text(), PAGE: _TABLE.sub(lambda found: found[1] + table() + found[2], page)}


def main() -> None:
    """See the module."""
    stale = []
    for path, text in wanted().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"{names}: not what the schema says; run: python scripts/platform_toml.py")


if __name__ == "__main__":
    main()
