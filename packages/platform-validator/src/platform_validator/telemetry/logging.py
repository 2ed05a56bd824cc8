"""Structured logs: events with context, as JSON or for people; guest text escaped, secrets removed last."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog

_LEVELS = {"trace": 10, "debug": 10, "info": 20, "warn": 30, "warning": 30, "error": 40, "off": 100}
_ALIASES = {"api_client": "platform_validator.platform_client"}
_SECRET_NAMES = re.compile(
    r"(secret|password|passphrase|token|authorization|signature|seed|private)", re.IGNORECASE
)
_SECRET_TEXT = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}|\b0x[0-9a-f]{64}\b")
_SHOWN = frozenset({"submission_sha256"})
_MAX_TEXT = 4096


class BadDirectives(ValueError):
    """Not `level` or `target=level,…`."""


class Directives:
    """Which level counts for which logger: the longest named parent decides.

    A directive is `level` or `target=level`, separated by commas; a target is a logger or a dotted parent.
    """

    def __init__(self, text: str) -> None:
        self._default = _LEVELS["info"]
        self._targets: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            target, equals, level = part.rpartition("=")
            if level.lower() not in _LEVELS:
                raise BadDirectives(f"expected a level ({', '.join(_LEVELS)}) or target=level, got {part!r}")
            if equals:
                name = target.strip().replace("::", ".")
                self._targets[_ALIASES.get(name, name)] = _LEVELS[level.lower()]
            else:
                self._default = _LEVELS[level.lower()]

    def allows(self, logger: str, level: int) -> bool:
        """Whether an event of this level (as in `logging`) is written."""
        name = logger
        while name:
            if name in self._targets:
                return level >= self._targets[name]
            name = name.rpartition(".")[0]
        return level >= self._default


def configure_logging(directives: Directives, form: str, stream: TextIO | None = None) -> None:
    """Set up structlog for the process. `form`: json, people, or auto (people on a terminal)."""
    out = stream or sys.stderr
    people = form == "people" or (form == "auto" and out.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=out.isatty()) if people else structlog.processors.JSONRenderer()
    )

    def chosen(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        del logger
        name = str(event.get("logger", ""))
        if not directives.allows(name, _LEVELS.get(method, logging.INFO)):
            raise structlog.DropEvent
        return event

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _name_logger,
            chosen,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
        logger_factory=_Factory(out),
        cache_logger_on_first_use=False,
    )


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Last: values of secret-looking names and secret-looking text go; text is escaped and capped."""
    return {key: _shown(key, value) for key, value in event.items()}


def _shown(key: str, value: Any) -> Any:
    return "[redacted]" if _SECRET_NAMES.search(key) and key not in _SHOWN else _clean(value, key)


def _clean(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {_clean(str(name), key): _shown(str(name), one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean(one, key) for one in value]
    if not isinstance(value, str):
        return value if isinstance(value, int | float | bool | None) else _clean(str(value), key)
    keep = "\n\t" if key in ("exception", "stack") else ""
    text = _SECRET_TEXT.sub("[redacted]", value[:_MAX_TEXT])
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" for c in text)


class _Logger(structlog.PrintLogger):
    def __init__(self, out: TextIO, name: str) -> None:
        super().__init__(out)
        self.name = name


class _Factory:
    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, *arguments: Any) -> _Logger:
        return _Logger(self._out, str(arguments[0]) if arguments else "")


def _name_logger(logger: Any, _: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["logger"] = getattr(logger, "name", "")
    return event
