"""The application: its parts, its routes, and the loops beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

import structlog
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from platform_api.auth import Authenticator, make_token
from platform_api.config import ApiSettings
from platform_api.database import Database
from platform_api.openapi import describe
from platform_api.problems import add_handlers
from platform_api.push import Push
from platform_api.queue import Queue
from platform_api.routes import administration, challenges, jobs, notifications, service, submissions
from platform_api.services import Services
from platform_api.telemetry import Measured, Metrics
from platform_api.validators import set_validator

__all__ = ["make_app", "make_token", "set_validator"]

_SWEEP_EVERY = 5.0
_RESTART_AFTER = 1.0
_ROUTERS = (service, challenges, jobs, submissions, administration, notifications)

log = structlog.get_logger(__name__)


def make_app(settings: ApiSettings) -> FastAPI:
    """The application; its database is opened and migrated at start-up."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = await Database.open(settings.database_url)
        try:
            auth = Authenticator(database, settings.accepted_audiences)
            push, queue = Push(database, auth), Queue(int(settings.lease_term.total_seconds() * 1000))
            metrics = Metrics(lambda: push.connected)
            services = app.state.services = Services(database, queue, push, auth, metrics)
            async with database.write() as connection:
                extended = await queue.extend_all(connection)
            log.info("api_started", leases_extended=extended, audiences=settings.accepted_audiences)
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(_supervised("push", push.run, metrics)),
                    tasks.create_task(_supervised("sweep", lambda: _sweep(services), metrics)),
                ]
                yield
                for loop in loops:
                    loop.cancel()
        finally:
            await database.close()
            log.info("api_stopped")

    app = FastAPI(
        title="Platform API",
        version=version("platform-api"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    for module in _ROUTERS:
        app.include_router(module.router)
    app.add_middleware(Measured)
    add_handlers(app)
    describe(app)
    return app


async def _sweep(services: Services) -> None:
    """Fail jobs whose last allowed lease has lapsed."""
    while True:
        try:
            async with services.database.write() as connection:
                retired = await services.queue.retire(connection)
        except (SQLAlchemyError, OSError) as error:
            log.warning("cannot_sweep", reason=str(error))
        else:
            if retired:
                services.metrics.events.labels("retired").inc(retired)
                log.warning("jobs_retired", jobs=retired)
        await asyncio.sleep(_SWEEP_EVERY)


async def _supervised(name: str, run: Callable[[], Awaitable[None]], metrics: Metrics) -> None:
    """Run a loop for ever: one that dies is counted, logged and started again."""
    while True:
        try:
            await run()
        except Exception:
            metrics.loop_failures.labels(name).inc()
            log.exception("loop_died", loop=name)
        await asyncio.sleep(_RESTART_AFTER)
