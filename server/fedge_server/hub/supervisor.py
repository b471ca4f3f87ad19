"""Worker processes of runs: started, restarted when they die, stopped when asked."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedge.errors import FedgeError
from fedge.logs import message_of
from fedge.wire.v1 import admin_pb2 as admin
from fedge_server.hub.home import Home
from fedge_server.monitoring.metrics import WORKER_RESTARTS
from fedge_server.registry.database import Registry

_log = logging.getLogger("fedge.hub")

STOP_S: Final = 30.0  # from the request to stop until the worker is killed
ORPHAN_S: Final = 0.5  # between looks at a worker that an earlier hub has started
MAX_BACKOFF_S: Final = 60.0
_ACTIVE: Final = ("queued", "running", "stopping")
_TAIL_BYTES: Final = 4096
_USER_MISTAKE: Final = 2  # exit code: starting again would fail again

Argv = Callable[[Path, str], list[str]]
"""Home and run to the command of a worker."""


def worker_argv(home: Path, run_id: str, log_format: str = "text") -> list[str]:
    """The command that runs one run."""
    command = [sys.executable, "-m", "fedge_server.link.worker", "--home", str(home), "--run", run_id]
    return [*command, "--log-format", log_format]


@dataclass(slots=True)
class _Supervised:
    task: asyncio.Task[None]
    pid: int = 0
    restarts: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """One task for each run that has work left."""

    def __init__(
        self,
        home: Home,
        registry: Registry,
        *,
        restarts: int,
        forget: Callable[[str], Awaitable[None]],
        argv: Argv = worker_argv,
        first_backoff_s: float = 1.0,
    ) -> None:
        self._home = home
        self._registry = registry
        self._restarts = restarts
        self._forget = forget
        self._argv = argv
        self._first_backoff_s = first_backoff_s
        self._runs: dict[str, _Supervised] = {}
        self._stopping = False

    def workers(self) -> list[admin.RunningWorker]:
        """The workers that run now."""
        return [
            admin.RunningWorker(run_id=run_id, pid=run.pid, restarts=run.restarts)
            for run_id, run in sorted(self._runs.items())
            if run.pid
        ]

    async def tidy(self) -> None:
        """Remove what runs that are over have left, where an earlier hub was killed before it could."""
        runs = await asyncio.to_thread(self._registry.runs)
        active = {run["id"] for run in runs if run["status"] in _ACTIVE}
        for folder in (self._home.all_objects, self._home.all_spools):
            for path in folder.glob("*/"):
                if path.name not in active:
                    await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def look(self) -> None:
        """Start workers of new runs, and stop those whose runs were asked to stop."""
        for run in await asyncio.to_thread(self._registry.runs):
            supervised = self._runs.get(run["id"])
            if run["status"] == "stopped" and supervised is not None:  # in the moment before its start
                supervised.stop.set()
            if run["status"] not in _ACTIVE or self._stopping:
                continue
            if supervised is None:
                task = asyncio.create_task(self._supervise(run["id"]))
                supervised = self._runs[run["id"]] = _Supervised(task)
            if run["status"] == "stopping":
                supervised.stop.set()

    async def stop(self) -> None:
        """Stop all workers; their runs stay as they are and go on when a hub is up again."""
        self._stopping = True
        for run in self._runs.values():
            run.stop.set()
        await asyncio.gather(*(run.task for run in self._runs.values()), return_exceptions=True)

    async def _supervise(self, run_id: str) -> None:
        try:
            await self._keep_running(run_id)
        except Exception as error:  # noqa: BLE001 - one run must not take the others' supervision along
            _log.error("run %s: cannot be supervised: %s", run_id, error)
            self._runs.pop(run_id, None)
            return
        self._runs.pop(run_id, None)
        run = await asyncio.to_thread(self._registry.run, run_id)
        if run is not None and run["status"] == "queued":  # resumed while we were tidying up
            await self.look()

    async def _keep_running(self, run_id: str) -> None:
        supervised = self._runs[run_id]
        deaths, committed = 0, -1
        while True:
            run = await asyncio.to_thread(self._registry.run, run_id)
            if run is None or run["status"] not in _ACTIVE:
                await self._over(run_id, run)
                return
            if run["status"] == "stopping" and not lock_holder(self._home.worker_lock(run_id)):
                await self._set(run_id, "stopped", "asked to stop")
                await self._over(run_id, run | {"status": "stopped", "reason": "asked to stop"})
                return
            if self._stopping:
                return
            begun = run["status"] != "queued" or await asyncio.to_thread(self._registry.begin_queued, run_id)
            if not begun:  # it was stopped in this moment; from now on a request to stop waits for the worker
                continue
            code = await self._one_worker(run_id, supervised)
            run = await asyncio.to_thread(self._registry.run, run_id)
            if run is None or run["status"] not in ("queued", "running") or self._stopping:
                continue
            rounds = len(await asyncio.to_thread(self._registry.records, run_id))
            deaths, committed = (1, rounds) if rounds > committed >= 0 else (deaths + 1, rounds)
            if code == _USER_MISTAKE or deaths > self._restarts:
                await self._set(run_id, "failed", self._last_line(run_id) or f"worker ended with {code}")
                continue
            supervised.restarts = await asyncio.to_thread(self._registry.count_restart, run_id)
            WORKER_RESTARTS.inc()
            about = {"run": run_id, "code": code, "restart": supervised.restarts}
            _log.warning(
                "run %(run)s: its worker ended with %(code)d; restart %(restart)d", about, extra=about
            )
            with suppress(TimeoutError):
                backoff = min(self._first_backoff_s * 2 ** (deaths - 1), MAX_BACKOFF_S)
                await asyncio.wait_for(supervised.stop.wait(), backoff)

    async def _one_worker(self, run_id: str, supervised: _Supervised) -> int:
        """Run a worker to its end, or wait for the end of one that outlived an earlier hub."""
        if pid := lock_holder(self._home.worker_lock(run_id)):
            _log.info("run %s: its worker %d is still there", run_id, pid)
            return await self._wait_for_orphan(run_id, pid, supervised)
        self._home.run(run_id).mkdir(parents=True, exist_ok=True)
        with self._home.run_log(run_id).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self._argv(self._home.root, run_id),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C for the hub is not one for the worker
                env=_environment(),
            )
        supervised.pid = process.pid
        about = {"run": run_id, "pid": process.pid}
        _log.info("run %s: worker %d started", run_id, process.pid, extra=about)
        try:
            return await self._wait(process, supervised)
        finally:
            supervised.pid = 0

    async def _wait(self, process: asyncio.subprocess.Process, supervised: _Supervised) -> int:
        ended = asyncio.ensure_future(process.wait())
        stop = asyncio.ensure_future(supervised.stop.wait())
        try:
            await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                with suppress(ProcessLookupError):
                    process.terminate()
                await asyncio.wait({ended}, timeout=STOP_S)
            if not ended.done():
                with suppress(ProcessLookupError):
                    process.kill()
            return await ended
        finally:
            stop.cancel()

    async def _wait_for_orphan(self, run_id: str, pid: int, supervised: _Supervised) -> int:
        supervised.pid = max(pid, 0)
        waited = 0.0
        try:
            while pid := lock_holder(self._home.worker_lock(run_id)):
                if supervised.stop.is_set() and pid > 0:
                    with suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGTERM if waited < STOP_S else signal.SIGKILL)
                    waited += ORPHAN_S
                await asyncio.sleep(ORPHAN_S)
            return 0
        finally:
            supervised.pid = 0

    async def _over(self, run_id: str, run: dict[str, Any] | None) -> None:
        """Remove what only an unfinished run needs."""
        if run is None:
            return
        line = f"run {run_id}: {run['status']}"
        about = {"run": run_id, "status": run["status"], "reason": run["reason"]}
        _log.info("%s%s", line, f" ({run['reason']})" if run["reason"] else "", extra=about)
        try:
            await self._forget(run_id)
        except FedgeError as error:
            _log.error("run %s: its messages cannot be removed: %s", run_id, error)
        for folder in (self._home.objects(run_id), self._home.spool(run_id)):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _set(self, run_id: str, status: str, reason: str) -> None:
        await asyncio.to_thread(self._registry.set_status, run_id, status, reason)

    def _last_line(self, run_id: str) -> str:
        lines = tail(self._home.run_log(run_id)).splitlines()
        return message_of(next((line.strip() for line in reversed(lines) if line.strip()), ""))[:500]


def tail(path: Path) -> str:
    """The last few kilobytes of a text file; empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _TAIL_BYTES, 0))
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def lock_holder(path: Path) -> int:
    """The process that holds a file's flock; 0: nobody does, -1: somebody, but it cannot be told who."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _flock_owner(os.fstat(file.fileno()), Path("/proc/locks")) or -1
    except FileNotFoundError:
        pass
    return 0


def _flock_owner(locked: os.stat_result, table: Path) -> int:
    """From the kernel's list: `1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF`.

    Files on two disks may share an inode, and not every file system is listed under the device that it
    tells: so it must be a process that has this very file open. It may be sent a signal.
    """
    with suppress(OSError):
        for line in table.read_text().splitlines():
            parts = line.split()
            if len(parts) > 5 and parts[1] == "FLOCK" and parts[5].rpartition(":")[2] == str(locked.st_ino):
                pid = int(parts[4])
                if pid > 0 and _has_open(pid, locked):
                    return pid
    return 0


def _has_open(pid: int, file: os.stat_result) -> bool:
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if os.path.samestat(entry.stat(), file):
                    return True
    return False


def _environment() -> dict[str, str]:
    """The hub's own, without what is the hub's alone."""
    return {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"} | {
        "PYTHONUNBUFFERED": "1"
    }
