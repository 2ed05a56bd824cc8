"""The command line of the local VMM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvicorn
from starlette.types import ASGIApp

from platform_vmm.errors import VmmError
from platform_vmm.images import IMAGE, RuntimeTable, build_runtime, prune_images
from platform_vmm.machines import Machines
from platform_vmm.prpc import Prpc
from platform_vmm.qemu.accelerator import last_answer
from platform_vmm.qemu.driver import QEMU_IMAGE
from platform_vmm.rootfs.cli import app as image_commands
from platform_vmm.rootfs.errors import ImageNotBuilt
from platform_vmm.rootfs.image import GuestImage, is_current, newest_image
from platform_vmm.server import make_app
from platform_vmm.simulation.pki import load_pki
from platform_vmm.state import StateDirectory

app = typer.Typer(
    help="A local VMM that speaks dstack's API on machines without TDX. Never a TEE.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(image_commands, name="image")
State = Annotated[
    Path, typer.Option("--state-dir", envvar="PLATFORM_VMM_STATE", help="Where VMs, token and keys live")
]
_SOCKET_PATH_MAX = 107
_PORT_MAX = 65535
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
    ports = tuple(guest_port or [18080, 3128])
    bad = [port for port in ports if not 1 <= port <= _PORT_MAX]
    if bad:
        _fail(f"--guest-port: expected 1 to 65535, got {bad[0]}")
    try:
        _raise_file_limit()
        asyncio.run(_serve(state_dir, listen, ports))
    except VmmError as error:
        _fail(str(error))


@app.command()
def token(*, state_dir: State = Path("./platform-vmm")) -> None:
    """Print the token that the API wants (made at the first start)."""
    print(StateDirectory(state_dir).token)


@app.command()
def images(
    *, state_dir: State = Path("./platform-vmm"), as_json: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """Show the runtime image of each image that VMs can have; that of local-sandbox is built where needed."""
    path = StateDirectory(state_dir).path
    runtime = build_runtime(path, lambda text: print(text, file=sys.stderr))
    found: dict[str, dict[str, Any]] = {IMAGE: {"digest": runtime.digest, "path": str(runtime.path)}}
    guest = _guest_image(path)
    if guest is not None:
        answer = last_answer(path / "images")
        accelerator = "not known before it served" if answer is None else f"{answer.name}: {answer.why}"
        found[QEMU_IMAGE] = {"digest": guest.digest, "path": str(guest.path), "accelerator": accelerator}
    if as_json:
        print(json.dumps({"name": runtime.name, **found[IMAGE], "images": found}))
        return
    for name, image in found.items():
        print(f"{name}: {runtime.name}@{image['digest']}\n  {image['path']}")
        if "accelerator" in image:
            print(f"  {image['accelerator']}")


def _guest_image(state: Path) -> GuestImage | None:
    """What virtual machines boot from, if it was built: `platform-vmm image build`."""
    try:
        image = newest_image(state)
    except ImageNotBuilt:
        return None
    if not is_current(image):
        todo = f"platform-vmm image build --state-dir {state}, then start again"
        log.warning("guest_image_outdated", digest=image.digest, what="another SDK was installed", todo=todo)
    return image


def main() -> None:
    """Entry point."""
    app()


async def _serve(path: Path, listen: str, ports: tuple[int, ...]) -> None:
    address = _address(listen)
    with StateDirectory(path) as state:
        runtime = build_runtime(state.path, lambda text: log.info("runtime_image", what=text))
        prune_images(state.path, keep=runtime)
        runtimes, pki = RuntimeTable([runtime]), load_pki(state.path)
        machines = Machines(
            state, runtimes=runtimes, pki=pki, guest_image=_guest_image(state.path), guest_ports=ports
        )
        for image in machines.images:
            if image.driver.missing:
                raise VmmError(image.driver.missing)
        server = _server(make_app(Prpc(machines), machines, pki, state.token))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, machines.stop)
        ready = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_until_stopped(machines, ready, server))
                await ready.wait()
                listener = _listen(address)
                log.info(
                    "vmm_listening",
                    at=listen,
                    images={image.name: image.driver.level for image in machines.images},
                    guest_ports=ports,
                    weaker={image.name: image.driver.weaker for image in machines.images},
                    tee=False,
                )
                await server.serve(sockets=[listener])
                machines.stop()
        except* VmmError as errors:
            raise errors.exceptions[0] from None
        finally:
            if isinstance(address, Path):
                address.unlink(missing_ok=True)


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


def _server(application: ASGIApp) -> uvicorn.Server:
    return _Server(
        uvicorn.Config(
            application,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
            timeout_keep_alive=10,
        )
    )


def _address(listen: str) -> Path | tuple[str, int]:
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        if not path or len(path.encode()) > _SOCKET_PATH_MAX:
            raise VmmError(f"--listen: expected a socket path of 1 to {_SOCKET_PATH_MAX} bytes, got {path!r}")
        return Path(path)
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > _PORT_MAX:
        raise VmmError(f"--listen: expected HOST:PORT or unix:/path, got {listen!r}")
    return host.strip("[]"), int(port)


def _listen(address: Path | tuple[str, int]) -> socket.socket:
    """Listen; whoever may connect still needs the token. Raises VmmError where it is taken."""
    try:
        if isinstance(address, tuple):
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            return socket.create_server(address, family=family, backlog=128)
        address.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(address))
        address.chmod(0o666)
        listener.listen(128)
    except OSError as error:
        raise VmmError(f"--listen: {address}: {error.strerror or error}") from error
    return listener


def _raise_file_limit() -> None:
    """Each VM takes a dozen descriptors, and two for each connection that its relays carry."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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
