"""A TCP proxy that does what networks do: it delays, throttles, resets, swallows and damages. No root needed.

It runs in a thread of its own with its own event loop; faults are read anew for every chunk, so a test can
change them while connections are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

CHUNK_BYTES = 16 * 1024
_POLL_S = 0.02  # how soon a stalled connection notices that it is stalled no more
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: closing sends RST


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to the bytes of every connection, in both directions unless it says otherwise."""

    delay_s: float = 0.0  # each chunk comes so much later
    bytes_per_s: float | None = None  # of one connection and direction; None: no limit
    reset_after: int | None = None  # RST to both sides once a connection has carried so many bytes
    hold_after: int | None = None  # nothing more passes once a connection has carried so many bytes
    swallow: bool = False  # accept and read everything, forward nothing: a black hole
    stall: bool = False  # read nothing, forward nothing: the network is gone, and may come back
    flip_up: int | None = None  # one bit of this byte (from 0) of what the client sends is flipped
    flip_down: int | None = None  # the same of what the server sends


NONE = Faults()


@dataclass(slots=True, eq=False)
class _Connection:
    """Two sockets and how many bytes have passed between them."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    carried: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})

    def reset(self) -> None:
        """Drop both sides with an RST, as a rebooted router does."""
        for writer in filter(None, (self.client, self.server)):
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):  # closed already
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


class FaultProxy:
    """Listens on a free port of 127.0.0.1 and forwards to a target; a context manager.

    Args:
        host: of the target.
        port: of the target; `retarget` changes it when a server comes back elsewhere.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.faults = NONE
        self.accepted = 0  # connections so far
        self.carried = 0  # bytes so far, of all connections and both directions
        self.port = 0
        self._open: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """host:port to connect to."""
        return f"127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        """How many are open now."""
        return len(self._open)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    def retarget(self, host: str, port: int) -> None:
        """Where new connections go from now on."""
        self._target = (host, port)

    def reset_all(self) -> None:
        """RST on every open connection, now."""
        self._call(self._reset_all())

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._reset_all()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _reset_all(self) -> None:
        for connection in list(self._open):
            connection.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._open.add(connection)
        self.accepted += 1
        try:
            while self.faults.stall:
                await asyncio.sleep(_POLL_S)
            server_reader, connection.server = await asyncio.open_connection(*self._target)
            pumps = [
                asyncio.create_task(self._pump(connection, reader, connection.server, "up")),
                asyncio.create_task(self._pump(connection, server_reader, writer, "down")),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # the target is not there: the client finds its connection closed
        finally:
            self._open.discard(connection)
            for side in filter(None, (writer, connection.server)):
                side.close()

    async def _pump(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: str,
    ) -> None:
        while True:
            while self.faults.stall:
                await asyncio.sleep(_POLL_S)
            data = await reader.read(CHUNK_BYTES)
            while self._holds(connection) and not writer.is_closing():
                await asyncio.sleep(_POLL_S)
            faults = self.faults
            if not data:
                if not faults.swallow and writer.can_write_eof():
                    writer.write_eof()
                return
            before = connection.carried[direction]
            connection.carried[direction] += len(data)
            if faults.swallow:
                continue
            self.carried += len(data)
            await self._wait(len(data), faults)
            limit = faults.reset_after
            if limit is not None and sum(connection.carried.values()) >= limit:
                connection.reset()
                return
            flip = faults.flip_up if direction == "up" else faults.flip_down
            writer.write(_flipped(data, before, flip))
            await writer.drain()

    def _holds(self, connection: _Connection) -> bool:
        most = self.faults.hold_after
        return most is not None and sum(connection.carried.values()) >= most

    async def _wait(self, size: int, faults: Faults) -> None:
        pause = faults.delay_s + (size / faults.bytes_per_s if faults.bytes_per_s else 0.0)
        if pause:
            await asyncio.sleep(pause)
        while self.faults.stall:
            await asyncio.sleep(_POLL_S)


def _flipped(data: bytes, before: int, position: int | None) -> bytes:
    """The chunk that begins at byte `before`, with one bit of byte `position` flipped if it lies within."""
    if position is None or not before <= position < before + len(data):
        return data
    damaged = bytearray(data)
    damaged[position - before] ^= 0x10
    return bytes(damaged)
