"""One connection to the hub: the resident stream, and the calls that carry tensors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio

from fedge.errors import FormatError
from fedge.wire import BULK_BYTES, MAX_MESSAGE_BYTES, PART_BYTES, PING_MS, TURN_S
from fedge.wire.v1 import link_pb2 as pb
from fedge.wire.v1 import telemetry_pb2
from fedge.wire.v1.distribution_pb2_grpc import DistributionStub
from fedge.wire.v1.link_pb2_grpc import LinkStub
from fedge.wire.v1.records_pb2 import Object
from fedge.wire.v1.telemetry_pb2_grpc import TelemetryStub
from fedge_client.agent.figures import COUNTED
from fedge_client.agent.identity import Identity
from fedge_client.delivery import CALL_S, GRACE_S, Refusal, Report, Standing, Told, note_request, refusals

WELCOME_TIMEOUT_S: Final = 20.0
OLDEST_HUB: Final = 2  # wire version; it knows turns
TURN_TIMEOUT_S: Final = TURN_S + 20.0
AGAIN_S: Final = 0.5  # before a turn is asked for again
FIRST_DELAY_S: Final = 1.0  # most that is waited before the first new attempt

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", PING_MS),  # a connection that died silently is found within 40 s
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),  # resume is ours
    ("grpc.use_local_subchannel_pool", 1),  # each Link, and each bulk transfer, connects anew
)


def backoff(attempt: int, maximum_s: float, rng: random.Random) -> float:
    """Seconds before attempt 1, 2, ...: full jitter, so that a fleet does not come back at one moment.

    The bound doubles with each attempt (Brooker 2015, Exponential Backoff and Jitter).
    """
    return rng.uniform(0.0, min(maximum_s, FIRST_DELAY_S * 2.0 ** min(attempt - 1, 32)))


class Closed(Exception):  # noqa: N818 - a fact, not an error
    """Nobody waits for this message any more."""


class Link:
    """An open connection; what breaks it is raised as grpc.RpcError by the call under way.

    Objects of more than `BULK_BYTES` travel one by one over connections of their own, each of which ends with
    its transfer.

    Args:
        identity: of the moment; asked at each connection.
    """

    def __init__(self, identity: Callable[[], Identity]) -> None:
        self._identity = identity
        self._channel = _channel(identity())
        self._stub: Any = LinkStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._delivery: Any = DistributionStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._telemetry: Any = TelemetryStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._stream: Any = None
        self.wire_version = 0  # that both sides speak; 0 before Welcome

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call on it; a bulk transfer under way goes on."""
        if self._stream is not None:
            self._stream.cancel()
        await self._channel.close()

    async def greet(self, hello: pb.Hello) -> pb.Welcome:
        """Open the resident stream.

        Raises:
            grpc.RpcError: no connection, or the hub refuses this device.
            FormatError: what answers is no hub, or too old a one.
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
        if self.wire_version < OLDEST_HUB:
            raise FormatError(
                f"the server speaks wire version {self.wire_version}, this device needs {OLDEST_HUB}; "
                "install a newer fedge on the server"
            )
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

    async def poll(self, standing: Standing, wait_s: float) -> Told:
        """Which version is for this device; waits for so long at most where there is nothing new."""
        with _closed_is_broken():
            return Told.of(await self._delivery.Poll(standing.request(wait_s), timeout=wait_s + GRACE_S))

    async def note(self, reports: Sequence[Report]) -> list[Refusal]:
        """Send reports of versions; those that the server will never take."""
        with _closed_is_broken():
            return refusals(reports, await self._delivery.Note(note_request(reports), timeout=CALL_S))

    async def tell(self, request: telemetry_pb2.TelemetryRequest) -> telemetry_pb2.TelemetryReply:
        """Send windows of telemetry."""
        with _closed_is_broken():
            reply: telemetry_pb2.TelemetryReply = await self._telemetry.Report(request, timeout=CALL_S)
            return reply

    async def fetch(self, message_id: str, wanted: Object, offset: int) -> AsyncGenerator[bytes, None]:
        """The bytes of a message's object from an offset on.

        Raises:
            Closed: nobody waits for this message any more.
        """
        request = pb.FetchRequest(message_id=message_id, sha256=wanted.sha256, offset=offset)
        turn = pb.TurnRequest(message_id=message_id, kind=pb.TurnRequest.FETCH, sha256=wanted.sha256)
        with _closed_is_broken():
            async with self._carrier(turn, wanted.size) as (stub, _):
                call = stub.Fetch(request)
                try:
                    async for chunk in call:
                        COUNTED.add("fedge_agent_bytes_total", "down", len(chunk.data))
                        yield chunk.data
                finally:
                    call.cancel()  # of no effect when it has ended; else the hub need not send the rest

    async def submit(self, header: pb.SubmitHeader, sent: Object, path: Path | None) -> pb.SubmitReply:
        """Send an answer and its object's bytes; a bulk object's from where an earlier attempt broke off.

        Raises:
            Closed: nobody waits for this message any more.
        """
        turn = pb.TurnRequest(message_id=header.message_id, kind=pb.TurnRequest.SUBMIT, sha256=sent.sha256)
        with _closed_is_broken():
            async with self._carrier(turn, sent.size) as (stub, arrived):
                header.offset = min(arrived, sent.size)
                reply: pb.SubmitReply = await stub.Submit(_parts(header, path))
                return reply

    @asynccontextmanager
    async def _carrier(self, turn: pb.TurnRequest, size: int) -> AsyncIterator[tuple[Any, int]]:
        """What an object of this size travels over, and how many of its bytes the hub has already."""
        if size <= BULK_BYTES:
            yield self._stub, 0
            return
        arrived = await self._turn(turn)
        channel = _channel(self._identity())
        try:
            yield LinkStub(channel), arrived  # type: ignore[no-untyped-call]  # generated
        finally:
            await channel.close()

    async def _turn(self, request: pb.TurnRequest) -> int:
        """Wait until the hub keeps a place for us; how many bytes it has already."""
        while True:
            reply: pb.TurnReply = await self._stub.Turn(request, timeout=TURN_TIMEOUT_S)
            if not reply.wanted:
                raise Closed
            if reply.granted:
                return reply.offset
            await asyncio.sleep(AGAIN_S)


def _channel(identity: Identity) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(identity.bundle, identity.key_pem, identity.certificate)
    return grpc.aio.secure_channel(identity.hub.link_address, credentials, _OPTIONS)


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
            COUNTED.add("fedge_agent_bytes_total", "up", len(data))
            yield pb.SubmitPart(data=data)


def said(error: grpc.RpcError) -> str:
    """One line for what a call ended with."""
    details = " ".join((error.details() or "").split())[:300]
    return f"{error.code().name}: {details}" if details else str(error.code().name)
