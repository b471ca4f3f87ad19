"""The agent's side of the training process: started at need, ended when idle, replaced when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from fedge.errors import FormatError
from fedge.wire.v1.records_pb2 import Result
from fedge_client.agent import frames
from fedge_client.agent.answering import failure
from fedge_client.agent.frames import Job
from fedge_client.agent.settings import Training

GRACE_S: Final = 5.0  # for work that is cancelled to end between two operations

Changed = Callable[[str], None]
"""Told in a few words when the training process starts, works, rests or ends."""


class _Died(Exception):  # noqa: N818 - a fact, not an error: the caller decides
    def __init__(self, code: int) -> None:
        self.killed = code < 0
        how = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        super().__init__(f"training process died ({how})")


class TrainingChild:
    """One process that runs one job at a time."""

    def __init__(self, home: Path, settings: Training, changed: Changed) -> None:
        self._home, self._settings, self._changed = home, settings, changed
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._starting = asyncio.Lock()
        self._idle: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the process if there is none; it loads torch by itself from here on."""
        async with self._starting:
            if self.pid is not None:
                return
            await self._end()
            ours, theirs = socket.socketpair()
            limits = self._settings
            numbers = (theirs.fileno(), os.getpid(), limits.max_memory_bytes, limits.threads, limits.nice)
            environment = os.environ | {
                "OMP_NUM_THREADS": str(limits.threads),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
                "FLWR_HOME": str(self._home / "cache" / "flwr"),
            }
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "fedge_client.agent.training", str(self._home)),
                    *map(str, numbers),
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=sys.stderr,
                )
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
            self._changed(f"started (process {self._process.pid})")
            self._rest()

    async def run(self, job: Job, work: bytes) -> Result:
        """The answer to a message; a process that was killed is replaced once.

        Cancelling this call ends the work: between two operations, or by SIGKILL after a grace.
        """
        try:
            for again in (True, False):
                try:
                    return await self._attempt(job, work)
                except _Died as death:
                    self._changed(str(death))
                    if not death.killed or not again:
                        return failure(str(death))
            raise AssertionError  # the loop returns
        except FormatError as error:
            await self._end()
            return failure(str(error))
        finally:
            self._rest()

    async def _attempt(self, job: Job, work: bytes) -> Result:
        await self.start()
        if self._idle is not None:
            self._idle.cancel()
        exchange = asyncio.ensure_future(self._exchange(frames.job_frame(job, work)))
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError:
            await self._interrupt(exchange)
            raise
        except (ConnectionError, asyncio.IncompleteReadError):
            raise _Died(await self._end()) from None

    async def _exchange(self, frame: bytes) -> Result:
        assert self._reader is not None  # noqa: S101 - `start` has set them
        assert self._writer is not None  # noqa: S101
        self._writer.write(frame)
        await self._writer.drain()
        of_json, of_body = frames.lengths(await self._reader.readexactly(frames.HEAD.size))
        await self._reader.readexactly(of_json)
        try:
            result: Result = Result.FromString(await self._reader.readexactly(of_body))
            return result
        except DecodeError as error:
            raise FormatError(f"training process: its answer is malformed ({error})") from error

    async def _interrupt(self, exchange: asyncio.Future[Result]) -> None:
        """End the work under way; the process survives if it ends in time."""
        if self._process is not None and self.pid is not None:
            self._process.send_signal(signal.SIGUSR1)
        done, _ = await asyncio.wait([exchange], timeout=GRACE_S)
        if not done:
            exchange.cancel()
            self._changed("killed: the work did not end when it was cancelled")
            await self._end()
        elif exchange.exception() is not None:
            await self._end()

    def _rest(self) -> None:
        """Begin to count the time without work."""
        if self._idle is not None:
            self._idle.cancel()
        if self._settings.idle_unload_s and self.pid is not None:
            self._idle = asyncio.ensure_future(self._unload())

    async def _unload(self) -> None:
        await asyncio.sleep(self._settings.idle_unload_s)
        await self._end(grace_s=GRACE_S)
        self._changed("unloaded: no work")

    async def stop(self) -> None:
        """End the process."""
        if self._idle is not None:
            self._idle.cancel()
        await self._end()

    async def _end(self, grace_s: float = 0.0) -> int:
        """Close the socket, which ends an idle process; kill it after the grace. Returns its exit code."""
        process, self._process = self._process, None
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None
        if process is None:
            return 0
        if process.returncode is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), grace_s or 0.2)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        return process.returncode or 0
