"""Raw devices: they speak the link with a real certificate, and answer whatever a test wants them to.

No agent and no training stands behind them, so a thousand fit into a process, and a hostile one says what no
agent of ours would.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from fedge.wire import BULK_BYTES, MAX_MESSAGE_BYTES, PART_BYTES, TURN_S, WIRE_VERSION
from fedge.wire.v1 import link_pb2, link_pb2_grpc, records_pb2

ARRAYS, METRICS, CONFIG = records_pb2.Record.ARRAYS, records_pb2.Record.METRICS, records_pb2.Record.CONFIG
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),  # a hostile device respects no limit
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for each device
]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a device needs to open the link."""

    address: str  # host:port
    key: bytes  # PEM
    certificate: bytes  # PEM
    ca: bytes  # PEM of the authorities to trust

    @classmethod
    def of_home(cls, home: Path, address: str | None = None) -> Identity:
        """The identity of a device that `fedge-client enroll` has made.

        Args:
            home: the device's folder.
            address: instead of the one that it was told, to go through a proxy.
        """
        folder = home / "identity"
        hub = json.loads((folder / "hub.json").read_text(encoding="utf-8"))
        key, certificate, ca = (
            (folder / name).read_bytes() for name in ("device.key", "certificate.pem", "ca.pem")
        )
        return cls(address or hub["link_address"], key, certificate, ca)

    def channel(self) -> grpc.aio.Channel:
        """A connection of this device alone."""
        credentials = grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)
        return grpc.aio.secure_channel(self.address, credentials, options=_OPTIONS)


class RawDevice:
    """One connection to the hub, and what it answers.

    Args:
        identity: with a certificate that the hub's authority has issued.
        tasks: offered: digest by name.
        answer: called with this device and each message that the hub sends.
        tags: of the device.
        wire_version: that it says it speaks.
    """

    def __init__(
        self,
        identity: Identity,
        tasks: Mapping[str, str],
        answer: Answer,
        *,
        tags: Sequence[str] = (),
        wire_version: int = WIRE_VERSION,
    ) -> None:
        self._identity, self._answer = identity, answer
        self._hello = link_pb2.Hello(
            wire_version=wire_version,
            fedge_version="0",
            tasks=[link_pb2.OfferedTask(name=name, digest=digest) for name, digest in tasks.items()],
            tags=tags,
            cores=1,
            memory_bytes=2**30,
        )
        self.welcome: link_pb2.Welcome | None = None
        self.received: list[link_pb2.Work] = []
        self.outcomes: list[link_pb2.SubmitReply] = []
        self.failures: list[str] = []  # of answers that raised: status and details

    async def serve(self, connected: Callable[[], None] = lambda: None) -> None:
        """Connect and answer until cancelled or cut off.

        Raises:
            grpc.aio.AioRpcError: the hub ended the stream, or could not be reached.
        """
        async with self._identity.channel() as channel:
            self.link = link_pb2_grpc.LinkStub(channel)
            call = self.link.Connect()
            await call.write(link_pb2.DeviceMessage(hello=self._hello))
            working: set[asyncio.Task[None]] = set()
            try:
                async for message in call:
                    if message.HasField("welcome"):
                        self.welcome = message.welcome
                        connected()
                    elif message.HasField("work"):
                        self.received.append(message.work)
                        task = asyncio.create_task(self._work(message.work))
                        working.add(task)
                        task.add_done_callback(working.discard)
            finally:
                for task in working:
                    task.cancel()
                await asyncio.gather(*working, return_exceptions=True)

    async def _work(self, work: link_pb2.Work) -> None:
        try:
            await self._answer(self, work)
        except grpc.aio.AioRpcError as error:
            self.failures.append(f"{error.code().name}: {error.details()}")

    async def fetch(self, work: link_pb2.Work) -> AsyncIterator[bytes]:
        """The bytes of a message's object, in chunks."""
        wanted = work.content.object
        request = link_pb2.FetchRequest(message_id=work.message_id, sha256=wanted.sha256)
        turn = link_pb2.TurnRequest(
            message_id=work.message_id, kind=link_pb2.TurnRequest.FETCH, sha256=wanted.sha256
        )
        async with self._carrier(turn, wanted.size) as stub:
            async for chunk in stub.Fetch(request):
                yield chunk.data

    @asynccontextmanager
    async def _carrier(self, turn: link_pb2.TurnRequest, size: int) -> AsyncIterator[Any]:
        """What an object of this size travels over: a large one has its turn, and a connection of its own."""
        if size <= BULK_BYTES:
            yield self.link
            return
        while not (reply := await self.link.Turn(turn, timeout=TURN_S + 20)).granted:
            if not reply.wanted:
                break  # the hub will say the same of the transfer
        async with self._identity.channel() as channel:
            yield link_pb2_grpc.LinkStub(channel)

    async def submit(
        self, work: link_pb2.Work, result: bytes, body: AsyncIterator[bytes]
    ) -> link_pb2.SubmitReply:
        """Send an answer and note its outcome."""

        async def parts() -> AsyncIterator[link_pb2.SubmitPart]:
            header = link_pb2.SubmitHeader(message_id=work.message_id, result=result)
            yield link_pb2.SubmitPart(header=header)
            async for data in body:
                yield link_pb2.SubmitPart(data=data)

        sent = _object_of(result)
        turn = link_pb2.TurnRequest(
            message_id=work.message_id, kind=link_pb2.TurnRequest.SUBMIT, sha256=sent.sha256
        )
        async with self._carrier(turn, sent.size) as stub:
            reply: link_pb2.SubmitReply = await stub.Submit(parts())
        self.outcomes.append(reply)
        return reply


def _object_of(result: bytes) -> records_pb2.Object:
    """What an answer declares; garbage declares nothing."""
    try:
        return records_pb2.Result.FromString(result).content.object
    except DecodeError:
        return records_pb2.Object()


Answer = Callable[[RawDevice, link_pb2.Work], Awaitable[None]]
"""What a device does with a message: fetch, submit, or neither."""


async def chunked(data: bytes, pause: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[bytes]:
    """Bytes as a device sends them."""
    for start in range(0, len(data), PART_BYTES):
        yield data[start : start + PART_BYTES]
        if pause is not None:
            await pause()


def tensor(name: str, dtype: str, shape: Sequence[int]) -> records_pb2.Tensor:
    """A tensor's declaration."""
    return records_pb2.Tensor(name=name, dtype=dtype, shape=shape)


def metrics(values: Mapping[str, float]) -> records_pb2.Record:
    """A metrics record; whole numbers travel as such."""
    entries = [
        records_pb2.Entry(
            key=key,
            value=records_pb2.Value(integer=value)
            if isinstance(value, int)
            else records_pb2.Value(real=value),
        )
        for key, value in values.items()
    ]
    return records_pb2.Record(name="metrics", kind=METRICS, entries=entries)


def update(
    tensors: Sequence[records_pb2.Tensor],
    data_sha256: bytes,
    size: int,
    *,
    examples: float = 10,
    loss: float = 0.5,
) -> bytes:
    """A serialised answer to a train message, whether or not it makes sense."""
    content = records_pb2.Content(
        records=[
            records_pb2.Record(name="arrays", kind=ARRAYS, tensors=tensors),
            metrics({"num-examples": examples, "train_loss": loss}),
        ],
        object=records_pb2.Object(sha256=data_sha256, size=size),
    )
    return records_pb2.Result(content=content, seconds=0.01).SerializeToString()


def asked_tensors(work: link_pb2.Work) -> list[records_pb2.Tensor]:
    """The global model's tensors, as the message declares them."""
    return [tensor for record in work.content.records if record.kind == ARRAYS for tensor in record.tensors]


async def echo(device: RawDevice, work: link_pb2.Work) -> None:
    """Fetch the model and send it back as if it had been trained."""
    data = b"".join([chunk async for chunk in device.fetch(work)])
    result = update(asked_tensors(work), hashlib.sha256(data).digest(), len(data))
    await device.submit(work, result, chunked(data))


@dataclass(slots=True)
class Devices:
    """Raw devices on an event loop in a thread of their own, for tests that are not asynchronous."""

    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _running: list[Future[None]] = field(default_factory=list)
    _thread: threading.Thread = field(init=False)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, name="raw-devices", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running:
            running.cancel()
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result(timeout=20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    async def _drain(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def start(self, device: RawDevice, timeout_s: float = 20.0) -> Future[None]:
        """Connect a device; returns, once the hub has welcomed it, how its stream ends."""
        welcomed = threading.Event()
        running: Future[Any] = asyncio.run_coroutine_threadsafe(device.serve(welcomed.set), self._loop)
        running.add_done_callback(lambda _: welcomed.set())
        self._running.append(running)
        if not welcomed.wait(timeout_s):
            raise TimeoutError("no welcome from the hub")
        if running.done():
            running.result()
        return running

    def call(self, work: Awaitable[Any], timeout_s: float = 20.0) -> Any:
        """Run something on the devices' loop."""

        async def wrapped() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(wrapped(), self._loop).result(timeout=timeout_s)
