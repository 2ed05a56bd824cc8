"""One VM of the local VMM: dstack's states and automatic restarts around its record and its boots."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

import structlog

from platform_vmm.app_compose import read_app_compose
from platform_vmm.boot import Boot, Host
from platform_vmm.configuration import VmConfiguration
from platform_vmm.driver import Guest, Usage
from platform_vmm.errors import VmmError
from platform_vmm.record import Record

log = structlog.get_logger(__name__)
GRACE = 10.0
"""Seconds that ShutdownVm gives the guest after SIGTERM."""
OOM_LOOK = 5.0
"""Seconds between two looks at how many processes were killed for memory."""
_EVENTS = 20
_RETRY_MOST = 60.0


class Machine:
    """`record.started` is what was asked for, a boot is what is; together they are dstack's state."""

    def __init__(self, record: Record, folder: Path, host: Host) -> None:
        self.record = record
        self.folder = folder
        self.app = read_app_compose(record.configuration.compose_file)
        self.app_id = record.configuration.given_app_id or self.app.app_id
        self.boot_progress = ""
        self.boot_error = ""
        self.shutdown_progress = ""
        self.instance_id: str | None = None
        self.began: float | None = None
        self.ended: float | None = None
        self.events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._host = host
        self.guest: Guest | None = None
        self._active = record.started
        self._graceful = False
        self._changed = asyncio.Event()
        self._born = time.monotonic() - record.age

    def __repr__(self) -> str:
        return f"<Machine {self.record.id} {self.record.configuration.name!r} {self.state}>"

    @property
    def id(self) -> str:
        """A UUID."""
        return self.record.id

    @property
    def configuration(self) -> VmConfiguration:
        """What CreateVm was given."""
        return self.record.configuration

    @property
    def console(self) -> Path:
        """The serial log of the newest boot."""
        return self.folder / "serial.log"

    @property
    def state(self) -> str:
        """running, stopping, stopped, exited or removing."""
        if self.record.removing:
            return "removing"
        if self._active:
            return "running" if self.record.started else "stopping"
        return "exited" if self.record.started else "stopped"

    def start(self) -> None:
        """Ask for a running guest. Does nothing when it runs already.

        Raises:
            VmmError: It is being removed, or its record cannot be written.
        """
        if self.record.removing:
            raise VmmError("VM is being removed")
        self._want(started=True, graceful=False)

    def stop(self) -> None:
        """Ask for its end, at once.

        Raises:
            VmmError: Its record cannot be written.
        """
        if not self.record.removing:
            self._want(started=False, graceful=False)

    def shutdown(self) -> None:
        """Ask the guest to end by itself; it has GRACE seconds.

        Raises:
            VmmError: No guest is running, or its record cannot be written.
        """
        if self.guest is None or self.record.removing:
            raise VmmError("guest agent is unreachable: VM is not running")
        self.shutdown_progress = "powering off"
        self.note("shutdown.progress", self.shutdown_progress)
        self._want(started=False, graceful=True)

    def remove(self) -> None:
        """Ask for its end: stopped, then deleted, in the background.

        Also where that cannot be written, on a full disk: what is removed makes room.
        """
        if self.record.removing:
            return
        self.record.removing, self.record.started, self._graceful = True, False, False
        try:
            self.record.save(self.folder)
        except OSError as error:
            log.warning("vm_record_not_written", vm=self.id, reason=str(error))
        self._changed.set()

    def usage(self) -> Usage:
        """What its guest uses.

        Raises:
            VmmError: No guest is running.
        """
        if self.guest is None:
            raise VmmError("guest agent is unreachable: VM is not running")
        return self.guest.usage()

    async def run(self) -> None:
        """The machine's life, until it is removed; then nothing of it is left."""
        failures = 0
        while not self.record.removing:
            self._changed.clear()
            if not self.record.started:
                failures, self._active = 0, False
                await self._changed.wait()
                continue
            began = time.monotonic()
            await self._boot_once()
            if not self.record.started:
                continue
            failures = self._host.restarts.count(failures, time.monotonic() - began)
            pause = self._host.restarts.pause(failures)
            if pause is None:
                self.note("vmm.auto_restart.exhausted", f"{self._host.restarts.tries} restarts did not help")
                log.warning("vm_restarts_exhausted", vm=self.id)
                failures = 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()
        with contextlib.suppress(FileNotFoundError):  # somebody else removed it
            await asyncio.to_thread(shutil.rmtree, self.folder)

    def note(self, event: str, body: str) -> None:
        """An event in the ring that GetInfo shows."""
        self.events.append({"event": event, "body": body[:4096], "timestamp": int(time.time() * 1000)})

    def _want(self, *, started: bool, graceful: bool) -> None:
        """Write it down, then want it. What could not be written was not asked for.

        Raises:
            VmmError: The record cannot be written.
        """
        before = self.record.started
        self.record.started = started
        try:
            self.record.save(self.folder)
        except OSError as error:
            self.record.started = before
            raise VmmError(f"Failed to write the VM's record: {error.strerror or error}") from error
        self._graceful = graceful
        self._changed.set()

    def _progress(self, text: str) -> None:
        self.boot_progress = text
        self.note("boot.progress", text)

    async def _boot_once(self) -> None:
        self.boot_error, self.shutdown_progress = "", ""
        self._active = True
        self.began, self.ended = time.monotonic(), None
        boot = Boot(
            self.id,
            configuration=self.configuration,
            app=self.app,
            app_id=self.app_id,
            folder=self.folder,
            host=self._host,
            progress=self._progress,
        )
        try:
            guest = await self._started(boot)
            if guest is None:
                return
            self.guest, self.instance_id = guest, boot.instance_id
            self.note("instance.info", json.dumps({"app_id": self.app_id, "instance_id": self.instance_id}))
            self._progress("done")
            log.info("vm_started", vm=self.id, name=self.configuration.name, pid=guest.pid)
            if not guest.walled:
                self.note("vm.unwalled", "no packet filter in it: its empty network is the only wall")
                log.warning("vm_without_packet_filter", vm=self.id, name=self.configuration.name)
            await self._until_over(guest)
        except (VmmError, OSError) as error:
            self._failed(str(error))
        except Exception as error:
            log.exception("vm_boot_broke", vm=self.id)
            self._failed(f"internal error ({type(error).__name__}): see the VMM's log")
        finally:
            await self._end(boot)
            self.guest, self._active = None, False
            self.ended = time.monotonic()
            log.info("vm_ended", vm=self.id, name=self.configuration.name, state=self.state)

    async def _started(self, boot: Boot) -> Guest | None:
        """The guest, once it was started; None when its end was asked for, or came, before that."""
        lifetime = _hard_lifetime(self.configuration.user_config)
        oldest = None if lifetime is None else self._born + lifetime
        starting = asyncio.ensure_future(boot.start())
        try:
            while not starting.done():
                if oldest is not None and time.monotonic() >= oldest:
                    self._over(lifetime)
                if not self.record.started:
                    return None
                await self._change_or(starting, oldest)
            return starting.result()
        finally:
            starting.cancel()
            await asyncio.wait({starting})

    def _failed(self, reason: str) -> None:
        self.boot_error = reason
        self.note("boot.error", reason)
        log.warning("vm_boot_failed", vm=self.id, reason=reason)

    async def _end(self, boot: Boot) -> None:
        pause = 1.0
        while True:
            try:
                await boot.end()
            except OSError as error:
                log.warning("vm_does_not_die", vm=self.id, reason=str(error) or type(error).__name__)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _RETRY_MOST)
            else:
                return

    async def _until_over(self, guest: Guest) -> None:
        """Until the guest ends, was asked to end and did or had its time, or is too old."""
        lifetime = _hard_lifetime(self.configuration.user_config)
        oldest = None if lifetime is None else self._born + lifetime
        ended = asyncio.ensure_future(guest.exited())
        grace: float | None = None
        killed = 0
        try:
            while not ended.done():
                killed = self._look_for_oom(guest, killed)
                if not self.record.started and not self._graceful:
                    return
                if not self.record.started and grace is None:
                    guest.terminate()
                    grace = time.monotonic() + GRACE
                until = oldest if self.record.started else grace
                if until is not None and time.monotonic() >= until:
                    self._over(lifetime)
                    return
                look = time.monotonic() + OOM_LOOK
                await self._change_or(ended, look if until is None else min(until, look))
            self.note("vm.exited", _describe_exit(ended.result(), guest.oom_kills()))
        finally:
            ended.cancel()

    def _look_for_oom(self, guest: Guest, before: int) -> int:
        """Tell of processes that the kernel killed for memory, and let the guest go on.

        It takes a submission's before the SDK's, by their scores: ending the whole VM would make the
        submission's fault an infrastructure's. When the SDK itself is killed, the guest ends.
        """
        killed = guest.oom_kills()
        if killed > before:
            self.note("vm.oom", f"{killed - before} of its processes killed for memory; it goes on")
            log.warning("vm_process_killed_for_memory", vm=self.id, processes=killed - before)
        return killed

    async def _change_or(self, ended: asyncio.Future[Any], until: float | None) -> None:
        self._changed.clear()
        change: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
        timeout = None if until is None else max(0.0, until - time.monotonic())
        try:
            await asyncio.wait({ended, change}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            change.cancel()

    def _over(self, lifetime: float | None) -> None:
        if self.record.started:
            self.note("vm.lifetime", f"hard_lifetime_s {lifetime} reached")
            log.warning("vm_lifetime_reached", vm=self.id, lifetime_s=lifetime)
            self.record.started = False
            with contextlib.suppress(OSError):  # it is as old after a restart, and ends again
                self.record.save(self.folder)


def _hard_lifetime(user_config: str) -> float | None:
    """Seconds from CreateVm on, never renewed."""
    try:
        value = json.loads(user_config).get("hard_lifetime_s")
    except (ValueError, AttributeError, RecursionError):
        return None
    usable = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return float(value) if usable else None


def _describe_exit(code: int | None, oom_kills: int) -> str:
    how = "killed with its stage" if code is None else f"exit code {code}"
    return f"{how}, {oom_kills} killed for memory" if oom_kills else how
