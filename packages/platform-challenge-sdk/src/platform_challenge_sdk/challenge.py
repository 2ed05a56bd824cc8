"""The challenge's handlers, registered by decorators. One challenge a process: `challenge`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from platform_challenge_sdk.errors import SdkError
from platform_challenge_sdk.worker import in_thread

if TYPE_CHECKING:
    from platform_challenge_sdk.context import Context

Handler = Callable[..., Any]
F = TypeVar("F", bound=Handler)


class Challenge:
    """Handlers may be `async def` or plain functions; plain ones run in a worker thread.

    - `on_startup`, `on_ready`, `on_cleanup`: `()`, in this order around the jobs
    - `on_job(name=None)`: `(ctx, payload) -> dict` with a finite `score`, or the bare number; None is the
      default handler, `@challenge.on_job` and `@challenge.on_job()` are the same
    - `on_weights`: `(results: list[dict]) -> dict[str, float]`
    """

    def __init__(self) -> None:
        self._jobs: dict[str | None, Handler] = {}
        self._hooks: dict[str, Handler] = {}

    def on_startup(self, handler: F) -> F:
        """Before anything else, with the operator's environment in place."""
        return self._hook("startup", handler)

    def on_ready(self, handler: F) -> F:
        """After on_startup; then jobs may come."""
        return self._hook("ready", handler)

    def on_cleanup(self, handler: F) -> F:
        """When the CVM ends in an orderly way."""
        return self._hook("cleanup", handler)

    def on_weights(self, handler: F) -> F:
        """When the validator asks for weights over results."""
        return self._hook("weights", handler)

    @overload
    def on_job(self, name: F) -> F: ...
    @overload
    def on_job(self, name: str | None = None) -> Callable[[F], F]: ...
    def on_job(self, name: str | Handler | None = None) -> Any:
        """The handler of jobs named `name`, or of every job that no other handler takes."""
        if callable(name):
            return self._job(None, name)
        return lambda handler: self._job(name, handler)

    @property
    def handlers(self) -> list[str]:
        """Names of the job handlers; the default one is `default`."""
        return sorted(name or "default" for name in self._jobs)

    def job_handler(self, name: str | None) -> Handler:
        """The handler for a job.

        Raises:
            SdkError: No handler of that name and no default one.
        """
        handler = self._jobs.get(name) or self._jobs.get(None)
        if handler is None:
            raise SdkError(
                f"no handler for job {name!r}: the challenge has {', '.join(self.handlers) or 'none'}"
            )
        return handler

    async def call(self, hook: str) -> None:
        """Call a hook, where there is one."""
        if hook in self._hooks:
            await call(self._hooks[hook])

    async def weights(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Ask on_weights.

        Raises:
            SdkError: The challenge has none, or its answer is no dict of finite numbers.
        """
        if "weights" not in self._hooks:
            raise SdkError("this challenge has no on_weights handler")
        weights = await call(self._hooks["weights"], results)
        if not isinstance(weights, dict):
            raise SdkError(f"on_weights: expected a dict, got {type(weights).__name__}")
        for key, weight in weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not isinstance(key, str) or not number or not math.isfinite(weight):
                raise SdkError(f"on_weights: expected a finite number for a name, got {key!r}: {weight!r}")
        return {key: float(weight) for key, weight in weights.items()}

    async def run_job(self, name: str | None, ctx: Context, payload: dict[str, Any]) -> Any:
        """Run the handler of a job."""
        return await call(self.job_handler(name), ctx, payload)

    def _hook(self, kind: str, handler: F) -> F:
        self._hooks[kind] = handler
        return handler

    def _job(self, name: str | None, handler: Handler) -> Handler:
        if name in self._jobs:
            raise SdkError(f"two handlers for job {name!r}: name one of them, @challenge.on_job('name')")
        self._jobs[name] = handler
        return handler


async def call(handler: Handler, *arguments: Any) -> Any:
    """Call an async handler here, or a plain one in a worker thread."""
    if inspect.iscoroutinefunction(handler):
        return await handler(*arguments)
    return await in_thread(handler, *arguments)


challenge = Challenge()
"""The process's one challenge: `@challenge.on_job()`."""
