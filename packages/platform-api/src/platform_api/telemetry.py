"""Logs and metrics of the server."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Literal

import prometheus_client
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LogForm = Literal["people", "json"]
_METHODS = frozenset({"GET", "POST", "PATCH", "DELETE", "PUT", "HEAD", "OPTIONS"})


class Metrics:
    """What `/metrics` shows, in a registry of its own."""

    def __init__(self, connected: Callable[[], int]) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._refusals = prometheus_client.Counter(
            "platform_api_refusals", "Refusals by status and code", ["status", "code"], registry=self.registry
        )
        self._seconds = prometheus_client.Histogram(
            "platform_api_request_seconds",
            "Requests by method, route and status",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._jobs = prometheus_client.Gauge(
            "platform_api_jobs", "Jobs by status", ["status"], registry=self.registry
        )
        self.events = prometheus_client.Counter(
            "platform_api_job_events",
            "What happened to jobs: claimed, renewed, released, completed, failed, cancelled, retired",
            ["event"],
            registry=self.registry,
        )
        self.loop_failures = prometheus_client.Counter(
            "platform_api_loop_failures", "Failures of background loops", ["loop"], registry=self.registry
        )
        prometheus_client.Gauge(
            "platform_api_validators_connected", "Open notification WebSockets", registry=self.registry
        ).set_function(connected)

    def refused(self, status: int, code: str) -> None:
        """Count a refusal."""
        self._refusals.labels(str(status), code).inc()

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        known = method if method in _METHODS else "other"
        self._seconds.labels(known, route, str(status)).observe(seconds)

    def page(self, jobs: dict[str, int]) -> bytes:
        """The Prometheus text, with jobs counted by status."""
        for status in ("pending", "claimed", "completed", "failed", "cancelled"):
            self._jobs.labels(status).set(jobs.get(status, 0))
        return prometheus_client.generate_latest(self.registry)


class Measured:
    """ASGI middleware: how long each request took, by route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 500, time.monotonic()

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            metrics: Metrics = scope["app"].state.services.metrics
            metrics.answered(scope["method"], route, status, time.monotonic() - began)


def configure_logs(form: LogForm) -> None:
    """Events on stderr, as JSON lines or for people; the server's own log goes the same way."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(colors=False)
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("alembic", "uvicorn.error"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
