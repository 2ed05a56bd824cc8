"""What is wrong with a platform.toml, told to its author: key, line, what was expected, what to do."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

MAX_FAULTS = 20
MAX_DEPTH = 16
MAX_ENTRIES = 4096
TOO_DEEP = "nested too deep"
_SHOWN = 80

# An author's text is hostile: every pattern here takes time in proportion to its length. A string without
# an end reaches to the end of the text, and a key begins where no key could have begun before.
_TEXT = re.compile(
    r'"""(?:\\.|.)*?(?:"""|\Z)'
    r"|'''.*?(?:'''|\Z)"
    r'|"(?:\\[^\n]|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*",
    re.DOTALL,
)
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:[A-Za-z0-9_-]+[ \t]*\.[ \t]*){{{MAX_DEPTH}}}")
_HEADER = re.compile(r"[ \t]*\[\[?([^\]]*)\]")
_KEY = re.compile(
    r"""[ \t]*((?:[\w-]+|"[^"]*"|'[^']*')(?:[ \t]*\.[ \t]*(?:[\w-]+|"[^"]*"|'[^']*'))*)[ \t]*="""
)
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


@dataclass(frozen=True, slots=True)
class SpecFault:
    """One thing that is wrong; `line` counts from 1, where there is one."""

    key: str
    problem: str
    line: int | None = None
    suggestion: str | None = None

    def __str__(self) -> str:
        where = f"{self.key} (line {self.line})" if self.line else self.key
        told = f"{where}: {self.problem}" if where else self.problem
        return f"{told}; {self.suggestion}" if self.suggestion else told


def too_long_key(text: str) -> bool:
    """Whether a key has over 16 parts: TOML parsers take time with the square of their number."""
    return _LONG_KEY.search(_TEXT.sub("s", text)) is not None


def too_much(table: Mapping[str, Any]) -> str | None:
    """What is wrong with the shape: over 16 deep, which recurses what walks it, or over 4096 entries."""
    level: list[Any] = [table]
    entries = 0
    for _ in range(MAX_DEPTH):
        entries += sum(map(len, level))
        if entries > MAX_ENTRIES:
            return f"expected at most {MAX_ENTRIES} keys and entries"
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return None
    return TOO_DEEP


def faults_of(error: ValidationError, model: type[BaseModel], text: str) -> list[SpecFault]:
    """The first twenty faults, and how many more there are."""
    found = error.errors(include_url=False, include_context=False)
    told = [_fault(dict(each), model, text) for each in found[:MAX_FAULTS]]
    if len(found) > MAX_FAULTS:
        told.append(SpecFault("", f"and {len(found) - MAX_FAULTS} faults more"))
    return told


def _fault(fault: dict[str, Any], model: type[BaseModel], text: str) -> SpecFault:
    path = [str(part) for part in fault["loc"] if part != "[key]"]
    key, line = ".".join(path)[:_SHOWN], line_of(text, path)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(model, path[:-1])
        near = difflib.get_close_matches(path[-1][:_SHOWN], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return SpecFault(key, "unknown key", line, hint)
    meaning = _meaning(model, path)
    if fault["type"] == "missing":
        return SpecFault(key, "missing", None, f"expected {meaning}" if meaning else None)
    problem = str(fault["msg"]).removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    return SpecFault(
        key, f"{problem}, got {_shown(fault['input'])}", line, f"expected {meaning}" if meaning else None
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'table' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > _SHOWN:
        return f"a number of {value.bit_length()} bits"  # longer ones than Python writes out in decimal
    return repr(value)[:_SHOWN]


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    inner = _model_at(model, path)
    return sorted(inner.model_fields) if inner is not None else []


def _meaning(model: type[BaseModel], path: Sequence[str]) -> str | None:
    """What a key is for: its own description, or that of the nearest key around it."""
    for end in range(len(path), 0, -1):
        inner = _model_at(model, path[: end - 1])
        if inner is not None and path[end - 1] in inner.model_fields:
            return inner.model_fields[path[end - 1]].description
    return None


def _model_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    found: Any = model
    for part in path:
        if isinstance(found, type) and issubclass(found, BaseModel):
            field = found.model_fields.get(part)
            found = field.annotation if field is not None else None
        elif typing.get_origin(found) is dict:
            found = typing.get_args(found)[1]
        else:
            return None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def line_of(text: str, path: Sequence[str]) -> int | None:
    """The line (from 1) of a key, or of the nearest table around it that is written down."""
    table: tuple[str, ...] = ()
    best, line = 0, None
    for number, written in enumerate(_TEXT.sub(_on_its_lines, text).split("\n"), 1):
        header, key = _HEADER.match(written), _KEY.match(written)
        if header is not None:
            table = full = _parts(header[1])
        elif key is not None:
            full = (*table, *_parts(key[1]))
        else:
            continue
        if best < len(full) <= len(path) and tuple(path[: len(full)]) == full:
            best, line = len(full), number
    return line


def _on_its_lines(found: re.Match[str]) -> str:
    """Strings of several lines hold no keys; lines keep their numbers."""
    several = found[0].startswith(('"""', "'''"))
    return "s" + "\n" * found[0].count("\n") if several else found[0]


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))
