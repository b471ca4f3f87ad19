"""`fedge-client serve`: a home becomes a running service, which takes up what is installed meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedge.errors import FedgeError, UserError
from fedge.files import sole_holder
from fedge_client.agent.settings import AskingSettings
from fedge_client.answers import count
from fedge_client.joint.joint import Joint
from fedge_client.runtime import Runtime
from fedge_client.serving.answered import Answered
from fedge_client.serving.holder import Holder
from fedge_client.serving.http import HttpEndpoint
from fedge_client.serving.limits import Limits
from fedge_client.serving.service import Counter, Service
from fedge_client.telemetry.counting import TICK_S, Counting
from fedge_client.telemetry.settings import Settings

log = logging.getLogger("fedge.serving")

FOLDER: Final = "serving"  # of a home
HTTP, GRPC = "http.sock", "grpc.sock"
LOOK_S: Final = 1.0  # between two looks at what is installed
WRITE_S: Final = 5.0  # between two counts of how sure the answers were
_MAX_KEPT: Final = 100_000  # confidences, between two counts
MODE: Final = 0o660  # of the sockets: programs of the same user or group may ask
_MAX_SOCKET_PATH: Final = 100  # bytes; the kernel's limit is 107
_LOOPBACK: Final = re.compile(r"(127\.0\.0\.1|localhost|\[::1\]):(\d{1,5})")
_COMMITTED: Final = ("installed/current",)  # replaced as a whole by each installation


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a unix socket, or a port of this machine alone."""

    path: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """`unix:PATH`, `127.0.0.1:PORT`, `localhost:PORT` or `[::1]:PORT`.

        Raises:
            UserError: anything else; other machines must not ask here.
        """
        if text.startswith("unix:") and len(text) > len("unix:"):
            path = Path(text.removeprefix("unix:")).absolute()
            if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
                raise UserError(f"{path}: too long for a unix socket (over {_MAX_SOCKET_PATH} bytes)")
            return cls(path)
        match = _LOOPBACK.fullmatch(text)
        if match is None or int(match[2]) > 65535:
            raise UserError(
                f"address {text!r}: must be unix:PATH or 127.0.0.1:PORT; only this device may ask"
            )
        return cls(None, match[1].strip("[]"), int(match[2]))

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Listening:
    """What is up, and where."""

    service: Service
    http: str = ""  # address; empty: not asked for
    grpc: str = ""


def mark_of(home: Path) -> tuple[object, ...]:
    """What changes whenever another release is committed; costs two looks at the disk."""
    found: list[object] = []
    for name in _COMMITTED:
        try:
            stat = (home / name).stat()
        except OSError:
            continue
        found.append((name, stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(found)


class Watcher:
    """Keeps a holder at what is installed: by another process, or by this one.

    Args:
        home: of the device.
        holder: whose model is exchanged.
        threads: of onnxruntime.
        open_: gives what is installed; it is called in a thread.
    """

    def __init__(
        self,
        home: Path,
        holder: Holder[Runtime],
        *,
        threads: int = 1,
        open_: Callable[..., Runtime] = Runtime.open,
    ) -> None:
        self._home, self._holder, self._threads, self._open = home, holder, threads, open_
        self._seen: tuple[object, ...] | None = None
        self._now = asyncio.Event()

    def look_now(self) -> None:
        """Look again without waiting, whatever has been seen."""
        self._seen = None
        self._now.set()

    async def look(self) -> None:
        """Exchange the model if another one was committed; on failure the one that answers goes on."""
        mark = await asyncio.to_thread(mark_of, self._home)
        if mark == self._seen:
            return
        self._seen = mark  # taken before the files are read: a later commit is seen at the next look
        try:
            runtime = await asyncio.to_thread(self._open, self._home, threads=self._threads)
        except FedgeError as error:
            log.warning("%s", error)
            return
        current = self._holder.current
        if current is None or current.installed != runtime.installed:
            self._holder.swap(runtime)
            log.info("release %d answers", runtime.release.version)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self._now.clear()
            await self.look()
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._now.wait()
            except TimeoutError:
                continue


class Confidences:
    """How sure the device's own answers are, on their way to the file that the agent reports a mean from.

    Kept in memory between two writes, and no more than is bounded: the rest does not count.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._kept: dict[int, list[float]] = {}

    def add(self, found: Answered) -> None:
        """Keep those of an answer."""
        kept = self._kept.setdefault(found.version, [])
        kept += [p.confidence for p in found.own][: _MAX_KEPT - len(kept)]

    async def write(self) -> None:
        """Count what has come since the last time."""
        kept, self._kept = self._kept, {}
        for version, values in sorted(kept.items()):  # the newest last: of another one nothing is kept
            await asyncio.to_thread(count, self._home, version, values)

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await asyncio.sleep(WRITE_S)
            await self.write()


@asynccontextmanager
async def listening(
    home: Path,
    holder: Holder[Runtime],
    limits: Limits,
    http: Address | None,
    grpc: Address | None,
    told: Callable[[Answered], None] = lambda _: None,
    counter: Counter | None = None,
    joint: Joint | None = None,
) -> AsyncIterator[Listening]:
    """A service of this holder that is up for as long as the block lasts.

    Raises:
        UserError: another service is up here, or an address cannot be listened on.
    """
    service = Service(holder, limits, told, counter, joint)
    async with AsyncExitStack() as held:
        held.callback(service.close)
        _alone(home, held)
        where = {"http": "", "grpc": ""}
        if http is not None:
            where["http"] = await _http(service, http, held)
        if grpc is not None:
            where["grpc"] = await _grpc(service, grpc, held)
        yield Listening(service, **where)


def _alone(home: Path, held: AsyncExitStack) -> None:
    folder = home / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(sole_holder(folder / "lock"))
    except BlockingIOError as error:
        raise UserError(f"{home}: another service is up here; stop it first") from error


async def _http(service: Service, address: Address, held: AsyncExitStack) -> str:
    endpoint = HttpEndpoint(service)
    try:
        if address.path is None:
            server = await asyncio.start_server(
                endpoint.serve, address.host, address.port, limit=endpoint.buffer_bytes, backlog=1024
            )
            where = Address(None, address.host, server.sockets[0].getsockname()[1])
        else:
            with _socket_of(address.path):
                server = await asyncio.start_unix_server(
                    endpoint.serve, address.path, limit=endpoint.buffer_bytes, backlog=1024
                )
            where = address
    except OSError as error:
        raise UserError(f"cannot listen on {address} ({error.strerror})") from error

    async def stop() -> None:
        server.close()
        await endpoint.close()

    held.push_async_callback(stop)
    return str(where)


async def _grpc(service: Service, address: Address, held: AsyncExitStack) -> str:
    from fedge_client.serving.rpc import server_of  # gRPC takes 15 MB: only where it is asked for

    server = server_of(service)
    try:
        if address.path is None:
            where = Address(None, address.host, int(server.add_insecure_port(str(address))))
        else:
            with _socket_of(address.path):
                server.add_insecure_port(str(address))
            where = address
    except (RuntimeError, OSError) as error:
        raise UserError(f"cannot listen on {address}; is it taken?") from error
    await server.start()
    if address.path is not None:
        address.path.chmod(MODE)
    held.push_async_callback(server.stop, None)
    return str(where)


class _socket_of:  # noqa: N801 - used like a function
    """Makes room for a socket file, and lets its maker give it the right mode from the first moment on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = 0

    def __enter__(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)  # of a service that was killed: we hold the lock
        self._before = os.umask(0o777 & ~MODE)

    def __exit__(self, *_: object) -> None:
        os.umask(self._before)


def serve(
    home: Path,
    *,
    http: Address | None,
    grpc: Address | None,
    limits: Limits,
    threads: int = 1,
    telemetry: Settings | None = None,
    asking: AskingSettings | None = None,
    ready: Callable[[Listening], Any] = lambda _: None,
) -> int:
    """Serve the installed model until a signal ends it; returns the exit code.

    Raises:
        UserError: neither address, another service is up here, an address is taken, or the cloud is to be
            asked and the device is not enrolled.
    """
    if http is None and grpc is None:
        raise UserError("give an address for --http or for --grpc")
    return asyncio.run(_serve(home.absolute(), http, grpc, limits, threads, telemetry, asking, ready))


async def _joint(
    home: Path, asking: AskingSettings | None, holder: Holder[Runtime], held: AsyncExitStack
) -> Joint | None:
    """Who is asked where the device is not sure, if anybody."""
    if asking is None or not asking.enabled:
        return None
    from fedge_client.joint.asking import asking_of  # gRPC and certificates: only where it is asked for

    log.info("joint: the cloud is %s", "not asked: private" if asking.private else "asked in doubt")
    return await held.enter_async_context(asking_of(home, asking, holder))


async def _serve(
    home: Path,
    http: Address | None,
    grpc: Address | None,
    limits: Limits,
    threads: int,
    telemetry: Settings | None,
    asking: AskingSettings | None,
    ready: Callable[[Listening], Any],
) -> int:
    holder: Holder[Runtime] = Holder()
    watcher = Watcher(home, holder, threads=threads)
    await watcher.look()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, watcher.look_now)
    sure, counting = Confidences(home), None if telemetry is None else Counting(home, telemetry)
    if counting is not None:
        await asyncio.to_thread(counting.tick, holder.current)
    async with AsyncExitStack() as held:
        joint = await _joint(home, asking, holder, held)
        up = await held.enter_async_context(
            listening(home, holder, limits, http, grpc, sure.add, counting, joint)
        )
        work = [asyncio.create_task(each) for each in (watcher.run(), sure.run(), _count(counting, holder))]
        for where in filter(None, (up.http, up.grpc)):
            log.info("listening on %s", where)
        ready(up)
        await stop.wait()
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
    await sure.write()
    if counting is not None:
        await asyncio.to_thread(counting.close)
    return 0


async def _count(counting: Counting | None, holder: Holder[Runtime]) -> None:
    """Keep what is counted at what answers, and at what time it is, until cancelled."""
    while counting is not None:
        await asyncio.to_thread(counting.tick, holder.current)
        await asyncio.sleep(TICK_S)
