"""The command line of the local VMM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import structlog
import typer
import uvicorn

from platform_vmm.errors import VmmError
from platform_vmm.images import RuntimeTable, build_runtime
from platform_vmm.machines import Machines
from platform_vmm.prpc import Prpc
from platform_vmm.server import make_app
from platform_vmm.simulation.pki import load_pki

app = typer.Typer(
    help="A local VMM that speaks dstack's API on machines without TDX. Never a TEE.",
    no_args_is_help=True,
    add_completion=False,
)
State = Annotated[
    Path, typer.Option("--state-dir", envvar="PLATFORM_VMM_STATE", help="Where VMs, token and keys live")
]
_SOCKET_PATH_MAX = 107
log = structlog.get_logger(__name__)


@app.command()
def serve(
    *,
    state_dir: State = Path("./platform-vmm"),
    listen: Annotated[
        str, typer.Option(envvar="PLATFORM_VMM_LISTEN", help="HOST:PORT or unix:/path")
    ] = "127.0.0.1:11530",
    guest_port: Annotated[
        list[int] | None,
        typer.Option(help="A TCP port of this host's loopback that guests reach at 10.0.2.2 (repeatable)"),
    ] = None,
    log_format: Annotated[str, typer.Option("--log", help="people or json")] = "people",
) -> None:
    """Run the VMM until SIGTERM; every guest ends with it."""
    _configure_logs(log_format)
    ports = tuple(guest_port or [18080])
    bad = [port for port in ports if not 1 <= port <= 65535]  # noqa: PLR2004 - TCP's ports
    if bad:
        _fail(f"--guest-port: expected 1 to 65535, got {bad[0]}")
    try:
        asyncio.run(_serve(_state(state_dir), listen, ports))
    except VmmError as error:
        _fail(str(error))


@app.command()
def token(*, state_dir: State = Path("./platform-vmm")) -> None:
    """Print the token that the API wants (made at the first start)."""
    print(_token(_state(state_dir)))


@app.command()
def images(
    *, state_dir: State = Path("./platform-vmm"), as_json: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """Show the runtime image, building it where it is not there yet."""
    runtime = build_runtime(_state(state_dir), lambda text: print(text, file=sys.stderr))
    if as_json:
        print(json.dumps({"name": runtime.name, "digest": runtime.digest, "path": str(runtime.path)}))
    else:
        print(f"{runtime.name}@{runtime.digest}\n  {runtime.path}")


def main() -> None:
    """Entry point."""
    app()


async def _serve(state: Path, listen: str, ports: tuple[int, ...]) -> None:
    runtime = build_runtime(state, lambda text: log.info("runtime_image", what=text))
    runtimes, pki = RuntimeTable([runtime]), load_pki(state)
    machines = Machines(state, runtimes=runtimes, pki=pki, guest_ports=ports)
    if machines.driver.missing:
        raise VmmError(machines.driver.missing)
    prpc = Prpc(machines, runtimes)
    server = _server(make_app(prpc, machines, pki, _token(state)), listen)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, machines.stop)
    ready = asyncio.Event()
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_until_stopped(machines, ready, server))
            await ready.wait()
            log.info("vmm_listening", at=listen, level=prpc.isolation_level, guest_ports=ports, tee=False)
            await server.serve()
            machines.stop()
    except* VmmError as errors:
        raise errors.exceptions[0] from None


async def _until_stopped(machines: Machines, ready: asyncio.Event, server: uvicorn.Server) -> None:
    try:
        await machines.run(ready)
    finally:
        ready.set()
        server.should_exit = True


class _Server(uvicorn.Server):
    """Leaves signals to the VMM, which ends its guests first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def _server(application: object, listen: str) -> uvicorn.Server:
    common = {"log_config": None, "access_log": False, "lifespan": "off", "timeout_graceful_shutdown": 2}
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        if len(path.encode()) > _SOCKET_PATH_MAX:
            raise VmmError(f"--listen: a socket path has at most {_SOCKET_PATH_MAX} bytes, {path!r} has more")
        Path(path).unlink(missing_ok=True)
        config = uvicorn.Config(application, uds=path, **common)  # type: ignore[arg-type]  # keywords as one dict
    else:
        host, _, port = listen.rpartition(":")
        if not host or not port.isdigit():
            raise VmmError(f"--listen: expected HOST:PORT or unix:/path, got {listen!r}")
        config = uvicorn.Config(application, host=host, port=int(port), **common)  # type: ignore[arg-type]  # as above
    return _Server(config)


def _state(path: Path) -> Path:
    path = path.absolute()
    path.mkdir(mode=0o711, parents=True, exist_ok=True)
    return path


def _token(state: Path) -> str:
    path = state / "token"
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
    return path.read_text().strip()


def _configure_logs(form: str) -> None:
    renderer = (
        structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)
