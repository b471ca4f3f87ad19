"""One connection to the hub: the resident stream, and the calls that carry tensors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio

from fedge.errors import FormatError
from fedge.wire import MAX_MESSAGE_BYTES, PART_BYTES
from fedge.wire.v1 import link_pb2 as pb
from fedge.wire.v1.link_pb2_grpc import LinkStub
from fedge_client.agent.identity import Identity

WELCOME_TIMEOUT_S: Final = 20.0
CALL_TIMEOUT_S: Final = 20.0  # of a small call
FIRST_DELAY_S: Final = 1.0  # most that is waited before the first new attempt

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),  # a connection that died silently is found within 40 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),  # resume is ours
    ("grpc.use_local_subchannel_pool", 1),  # a new connection shows the new certificate
)


def backoff(attempt: int, maximum_s: float, rng: random.Random) -> float:
    """Seconds before attempt 1, 2, ...: full jitter, so that a fleet does not come back at one moment.

    The bound doubles with each attempt (Brooker 2015, Exponential Backoff and Jitter).
    """
    return rng.uniform(0.0, min(maximum_s, FIRST_DELAY_S * 2.0 ** min(attempt - 1, 32)))


class Link:
    """An open connection; what breaks it is raised as grpc.RpcError by the call under way."""

    def __init__(self, identity: Identity) -> None:
        credentials = grpc.ssl_channel_credentials(identity.bundle, identity.key_pem, identity.certificate)
        self._channel = grpc.aio.secure_channel(identity.hub.link_address, credentials, _OPTIONS)
        self._stub: Any = LinkStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._stream: Any = None
        self.wire_version = 0  # that both sides speak; 0 before Welcome

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call on it."""
        if self._stream is not None:
            self._stream.cancel()
        await self._channel.close()

    async def greet(self, hello: pb.Hello) -> pb.Welcome:
        """Open the resident stream.

        Raises:
            grpc.RpcError: no connection, or the hub refuses this device.
            FormatError: what answers is no hub.
        """
        self._stream = self._stub.Connect()
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                try:
                    await self._stream.write(pb.DeviceMessage(hello=hello))
                except asyncio.InvalidStateError as error:  # the call had ended when we wrote
                    raise await self._ended() from error
                first = await self._stream.read()
        except TimeoutError as error:
            raise FormatError(f"the server did not answer within {WELCOME_TIMEOUT_S:g} s") from error
        if first is grpc.aio.EOF:
            raise await self._ended()
        if first.WhichOneof("kind") != "welcome":
            raise FormatError(f"the server answered {first.WhichOneof('kind')} instead of Welcome")
        self.wire_version = first.welcome.wire_version
        welcome: pb.Welcome = first.welcome
        return welcome

    async def _ended(self) -> Exception:
        code, details = await self._stream.code(), await self._stream.details()
        if code is grpc.StatusCode.OK:
            return FormatError("the server ended the stream")
        empty = grpc.aio.Metadata()
        error: Exception = grpc.aio.AioRpcError(code, empty, empty, details)
        return error

    async def messages(self) -> AsyncIterator[pb.HubMessage]:
        """What the hub sends, until it or `close` ends the stream."""
        with _closed_is_broken():
            while (message := await self._stream.read()) is not grpc.aio.EOF:
                yield message
            if await self._stream.code() is not grpc.StatusCode.OK:
                raise await self._ended()

    async def fetch(self, message_id: str, sha256: bytes, offset: int) -> AsyncGenerator[bytes, None]:
        """The bytes of a message's object from an offset on."""
        with _closed_is_broken():
            call = self._stub.Fetch(pb.FetchRequest(message_id=message_id, sha256=sha256, offset=offset))
            try:
                async for chunk in call:
                    yield chunk.data
            finally:
                call.cancel()  # of no effect when it has ended; else the hub need not send the rest

    async def progress(self, message_id: str, sha256: bytes) -> pb.ProgressReply:
        """How much of an answer's object has arrived."""
        request = pb.ProgressRequest(message_id=message_id, sha256=sha256)
        with _closed_is_broken():
            reply: pb.ProgressReply = await self._stub.Progress(request, timeout=CALL_TIMEOUT_S)
            return reply

    async def submit(self, header: pb.SubmitHeader, path: Path | None) -> pb.SubmitReply:
        """Send an answer, and its object's bytes from the header's offset on."""
        with _closed_is_broken():
            reply: pb.SubmitReply = await self._stub.Submit(_parts(header, path))
            return reply


@contextmanager
def _closed_is_broken() -> Iterator[None]:
    """Calls are cancelled when their channel is closed: to us that is a connection which broke.

    A task that is cancelled itself stays so.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionResetError("the connection was closed") from None
    except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
        raise ConnectionResetError("the connection was closed") from error


async def _parts(header: pb.SubmitHeader, path: Path | None) -> AsyncIterator[pb.SubmitPart]:
    yield pb.SubmitPart(header=header)
    if path is None:
        return
    with path.open("rb") as file:
        file.seek(header.offset)
        while data := file.read(PART_BYTES):
            yield pb.SubmitPart(data=data)


def said(error: grpc.RpcError) -> str:
    """One line for what a call ended with."""
    details = " ".join((error.details() or "").split())[:300]
    return f"{error.code().name}: {details}" if details else str(error.code().name)
