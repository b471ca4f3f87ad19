"""The HTTP endpoint: `POST /v1/infer`, `GET /v1/model`, `GET /v1/health`, in bounded memory.

Bodies are read, and long answers sent, only where there is room for them: `bodies_bytes` bounds the memory,
whatever the number of connections. Whoever is slow to send or to read is cut off; when all connections are
taken, the one that has been silent for longest gives way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from fedge.errors import AbsentError, BusyError, DataError, FedgeError, FormatError, LateError
from fedge_client.joint.joint import Joint
from fedge_client.serving.answered import answer_json
from fedge_client.serving.messages import (
    MAX_HEAD_BYTES,
    Head,
    StatusError,
    check_local,
    read_head,
    write_answer,
    write_error,
)
from fedge_client.serving.service import Query, Service, file_query, model_of, text_query

MEDIA: Final = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/bmp": "bmp",
    "image/gif": "gif",
    "image/tiff": "tiff",
    "image/webp": "webp",
    "image/x-portable-pixmap": "ppm",
    "image/x-portable-graymap": "pgm",
    "application/x-npy": "npy",
    "application/json": "json",
    "text/csv": "csv",
}
_END: Final = b"\r\n\r\n"
_SMALL: Final = 16 * 1024  # an answer that needs no place
_STATUS: Final[tuple[tuple[type[FedgeError], int], ...]] = (
    (DataError, 400),
    (BusyError, 503),
    (AbsentError, 503),
    (LateError, 504),
    (FormatError, 500),
)


class _Connection:
    """A connection, and since when it has been silent; None: a request of it is at work."""

    __slots__ = ("silent_since", "writer")

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.silent_since: float | None = time.monotonic()

    def cut(self) -> None:
        """Close at once, whatever has not been sent."""
        self.writer.transport.abort()


class HttpEndpoint:
    """Speaks HTTP for a service; give `serve` to asyncio's start_server or start_unix_server."""

    def __init__(self, service: Service) -> None:
        self._service, self._limits = service, service.limits
        self._connections: dict[_Connection, asyncio.Task[Any]] = {}
        self._bodies = 0  # bytes that have a place now
        self.cut = 0  # connections that were closed because of their slowness, or to make room

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    @property
    def buffer_bytes(self) -> int:
        """For the streams: what a connection may hold that nobody has asked for yet."""
        return MAX_HEAD_BYTES

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        connection = _Connection(writer)
        writer.transport.set_write_buffer_limits(high=0)  # so that `drain` waits until all has gone out
        if not self._room():
            writer.write(write_error(503, "too many connections; come again later"))
            await self._flush(connection)
            connection.cut()
            return
        task = asyncio.current_task()
        if task is None:
            raise AssertionError
        self._connections[connection] = task
        try:
            while await self._one(reader, connection):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # its other side has gone
        except asyncio.CancelledError:
            pass  # by `close`: asyncio's own streams (3.11) complain of a connection that ends cancelled
        finally:
            connection.cut()  # what was to be sent has been
            self._connections.pop(connection, None)

    async def close(self) -> None:
        """Cut all connections."""
        tasks = list(self._connections.values())
        for connection in list(self._connections):
            connection.cut()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _room(self) -> bool:
        """Whether there is a place for another connection, if need be that of one which says nothing."""
        if len(self._connections) < self._limits.connections:
            return True
        silent = [c for c in self._connections if c.silent_since is not None]
        if not silent:
            return False
        longest = min(silent, key=lambda c: c.silent_since or 0.0)
        del self._connections[longest]
        longest.cut()  # what reads from it finds its end
        self.cut += 1
        return True

    async def _one(self, reader: asyncio.StreamReader, connection: _Connection) -> bool:
        """Read and answer one request; whether the connection stays open."""
        connection.silent_since = time.monotonic()
        try:
            async with asyncio.timeout(self._limits.read_s):
                head = await self._head(reader)
            if head is None:
                return False
            check_local(head)
            with self._place(_length(head, self._limits.request_bytes)) as length:
                async with asyncio.timeout(self._limits.read_s):
                    if head.headers.get("expect", "").lower() == "100-continue":
                        connection.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    body = await reader.readexactly(length)
                connection.silent_since = None
                data = write_answer(*await self._answer(head, body), keep=head.keep)
            with self._place(len(data) if len(data) > _SMALL else 0):
                connection.writer.write(data)
                return await self._flush(connection) and head.keep
        except StatusError as error:
            data = write_error(error.status, str(error))
        except TimeoutError:
            self.cut += 1
            data = write_error(408, f"the request did not come within {self._limits.read_s:g} s")
        connection.writer.write(data)
        await self._flush(connection)
        return False

    async def _head(self, reader: asyncio.StreamReader) -> Head | None:
        """None: the other side has closed between two requests."""
        try:
            data = await reader.readuntil(_END)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return None
            raise
        except asyncio.LimitOverrunError as error:
            raise StatusError(431, f"the head is longer than {MAX_HEAD_BYTES} bytes") from error
        return read_head(data[: -len(_END)])

    @contextmanager
    def _place(self, length: int) -> Iterator[int]:
        """Room for a body: a request's until it is answered, a long answer's until it is sent."""
        if self._bodies + length > self._limits.bodies_bytes:
            raise StatusError(503, "too many bodies are under way; ask again later")
        self._bodies += length
        try:
            yield length
        finally:
            self._bodies -= length

    async def _flush(self, connection: _Connection) -> bool:
        """Wait until the answer has gone out; whoever does not read it is cut off."""
        try:
            async with asyncio.timeout(self._limits.read_s):
                await connection.writer.drain()
        except TimeoutError:
            self.cut += 1
            connection.cut()
            return False
        return True

    async def _answer(self, head: Head, body: bytes) -> tuple[int, dict[str, Any]]:
        wanted = {"/v1/infer": "POST", "/v1/model": "GET", "/v1/health": "GET"}.get(head.path)
        if wanted is None:
            raise StatusError(404, "there are POST /v1/infer, GET /v1/model and GET /v1/health")
        if head.method != wanted:
            raise StatusError(405, f"{head.path} is asked with {wanted}")
        try:
            if head.path == "/v1/infer":
                found = await self._service.infer(self._query(head, body), _deadline(head))
                return 200, answer_json(found)
            return 200, self._model() if head.path == "/v1/model" else self._health()
        except StatusError:
            raise
        except FedgeError as error:
            status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
            return status, _error(status, str(error))

    def _query(self, head: Head, body: bytes) -> Query:
        media = head.media_type
        if media == "text/plain":
            try:
                return text_query(body.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise DataError("the text is not UTF-8") from error
        if media not in MEDIA:
            raise StatusError(415, f"Content-Type must be one of {', '.join(sorted([*MEDIA, 'text/plain']))}")
        return file_query(MEDIA[media], body, self._limits)

    def _model(self) -> dict[str, Any]:
        with self._service.holder.lease() as runtime:
            release = runtime.release
            return {
                "release": release.version,
                "model": model_of(runtime),
                "task": release.task,
                "spec": runtime.spec.to_json(),
            }

    def _health(self) -> dict[str, Any]:
        service, current = self._service, self._service.holder.current
        return {
            "release": None if current is None else current.release.version,
            "open": service.open,
            "answered": service.answered,
            "refused": service.refused,
            "late": service.late,
            "swaps": service.holder.swaps,
            "connections": self.connections,
            "cloud": None if service.joint is None else cloud_json(service.joint),
        }


def cloud_json(joint: Joint) -> dict[str, Any]:
    """How it stands with the cloud: examples by the reason of their answer, and the circuit breaker."""
    return {"breaker": joint.breaker, "examples": dict(sorted(joint.counts.items()))}


def _length(head: Head, most: int) -> int:
    if head.length > most:
        raise StatusError(413, f"the body has {head.length} bytes, over {most}")
    return head.length


def _deadline(head: Head) -> float | None:
    text = head.headers.get("fedge-deadline-ms")
    if text is None:
        return None
    with suppress(ValueError):
        if 0 < (milliseconds := float(text)) < 1e9:
            return milliseconds / 1000
    raise StatusError(400, "Fedge-Deadline-Ms must be a positive number of milliseconds")


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"status": status, "message": message}}
