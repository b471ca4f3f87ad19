"""What hostile devices answer: each one a way to hurt a round, or the hub, that must hurt only itself."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Sequence

import devices
import numpy as np
from devices import Answer, RawDevice, asked_tensors, chunked, tensor, update

from fedge.wire import CHUNK_BYTES
from fedge.wire.v1 import link_pb2, records_pb2

TWO_GB = 2_000_000_000


def _size(tensors: Sequence[records_pb2.Tensor]) -> int:
    """Bytes of float32 tensors."""
    return sum(4 * int(np.prod(list(one.shape), dtype=np.int64)) for one in tensors)


async def _send(
    device: RawDevice,
    work: link_pb2.Work,
    tensors: Sequence[records_pb2.Tensor],
    data: bytes,
    examples: float = 10,
    loss: float = 0.5,
) -> None:
    result = update(tensors, hashlib.sha256(data).digest(), len(data), examples=examples, loss=loss)
    await device.submit(work, result, chunked(data))


def examples_of(value: float) -> Answer:
    """An honest update with a dishonest weight."""

    async def answer(device: RawDevice, work: link_pb2.Work) -> None:
        data = b"".join([chunk async for chunk in device.fetch(work)])
        await _send(device, work, asked_tensors(work), data, examples=value)

    return answer


async def not_finite(device: RawDevice, work: link_pb2.Work) -> None:
    """The right shapes, and one NaN."""
    tensors = asked_tensors(work)
    values = np.zeros(_size(tensors) // 4, np.float32)
    values[-1] = np.nan
    await _send(device, work, tensors, values.tobytes())


async def absurd_loss(device: RawDevice, work: link_pb2.Work) -> None:
    """An update whose training loss is infinite."""
    tensors = asked_tensors(work)
    await _send(device, work, tensors, bytes(_size(tensors)), loss=float("inf"))


async def other_shape(device: RawDevice, work: link_pb2.Work) -> None:
    """Each tensor flat: as many numbers, another shape."""
    tensors = [tensor(t.name, t.dtype, [int(np.prod(list(t.shape)))]) for t in asked_tensors(work)]
    await _send(device, work, tensors, bytes(_size(tensors)))


async def broadcast(device: RawDevice, work: link_pb2.Work) -> None:
    """One number for each tensor, which numpy would add to all of them."""
    tensors = [tensor(t.name, t.dtype, [1]) for t in asked_tensors(work)]
    await _send(device, work, tensors, bytes(_size(tensors)))


async def extra_name(device: RawDevice, work: link_pb2.Work) -> None:
    """One tensor more than was asked for."""
    tensors = [*asked_tensors(work), tensor("backdoor.weight", "float32", [3])]
    await _send(device, work, tensors, bytes(_size(tensors)))


async def object_dtype(device: RawDevice, work: link_pb2.Work) -> None:
    """A dtype whose values numpy would unpickle."""
    tensors = [tensor(t.name, "object", t.shape) for t in asked_tensors(work)]
    await _send(device, work, tensors, bytes(2 * _size(asked_tensors(work))))


async def huge_shape(device: RawDevice, work: link_pb2.Work) -> None:
    """A tensor that says it has 2^62 numbers, in a kilobyte."""
    tensors = [tensor(t.name, t.dtype, [2**31, 2**31]) for t in asked_tensors(work)]
    await _send(device, work, tensors, bytes(1000))


async def declares_two_gb(device: RawDevice, work: link_pb2.Work) -> None:
    """An object of 2 GB is announced, and a kilobyte sent."""
    tensors = [tensor("w", "float32", [TWO_GB // 4])]
    await device.submit(work, update(tensors, bytes(32), TWO_GB), chunked(bytes(1000)))


async def sends_two_gb(device: RawDevice, work: link_pb2.Work) -> None:
    """The right declaration, and bytes without an end."""
    tensors = asked_tensors(work)

    async def flood() -> AsyncIterator[bytes]:
        for _ in range(TWO_GB // CHUNK_BYTES):
            yield bytes(CHUNK_BYTES)

    await device.submit(work, update(tensors, bytes(32), _size(tensors)), flood())


async def too_little(device: RawDevice, work: link_pb2.Work) -> None:
    """Half of the declared bytes, then the end."""
    tensors = asked_tensors(work)
    size = _size(tensors)
    result = update(tensors, hashlib.sha256(bytes(size)).digest(), size)
    await device.submit(work, result, chunked(bytes(size // 2)))


async def other_bytes(device: RawDevice, work: link_pb2.Work) -> None:
    """As many bytes as declared, and not those of the digest."""
    tensors = asked_tensors(work)
    await device.submit(work, update(tensors, bytes(32), _size(tensors)), chunked(bytes(_size(tensors))))


async def garbage(device: RawDevice, work: link_pb2.Work) -> None:
    """No protobuf at all."""
    await device.submit(work, b"\xff" * 10 + os.urandom(1000), chunked(b""))


async def empty(device: RawDevice, work: link_pb2.Work) -> None:
    """A result without a kind."""
    await device.submit(work, b"", chunked(b""))


async def many_values(device: RawDevice, work: link_pb2.Work) -> None:
    """Three megabytes of metrics, each of which would become an object in Python."""
    item = records_pb2.Value(integer=1)
    values = records_pb2.Value(list=records_pb2.Values(items=[item] * 500_000))
    record = records_pb2.Record(name="metrics", kind=devices.METRICS)
    record.entries.add(key="x", value=values)
    result = records_pb2.Result(content=records_pb2.Content(records=[record]))
    await device.submit(work, result.SerializeToString(), chunked(b""))


async def nested(device: RawDevice, work: link_pb2.Work) -> None:
    """Lists in lists in lists."""
    value = records_pb2.Value(integer=1)
    for _ in range(40):
        value = records_pb2.Value(list=records_pb2.Values(items=[value]))
    record = records_pb2.Record(name="metrics", kind=devices.METRICS)
    record.entries.add(key="x", value=value)
    result = records_pb2.Result(content=records_pb2.Content(records=[record]))
    await device.submit(work, result.SerializeToString(), chunked(b""))


async def ugly_failure(device: RawDevice, work: link_pb2.Work) -> None:
    """A failure whose reason would drive a terminal, and is long."""
    reason = "\x1b[2J\r\n" + "x" * 100_000
    result = records_pb2.Result(failure=records_pb2.Failure(code=2, reason=reason))
    await device.submit(work, result.SerializeToString(), chunked(b""))


async def silent(device: RawDevice, work: link_pb2.Work) -> None:
    """Nothing at all."""
    await asyncio.Event().wait()


async def slow_loris(device: RawDevice, work: link_pb2.Work) -> None:
    """A header, and never the bytes."""

    async def never() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    tensors = asked_tensors(work)
    await device.submit(work, update(tensors, bytes(32), _size(tensors)), never())


async def twice(device: RawDevice, work: link_pb2.Work) -> None:
    """An honest answer, and another one after it."""
    await devices.echo(device, work)
    tensors = asked_tensors(work)
    await _send(device, work, tensors, bytes(_size(tensors)))
