"""A service that lies in each way that a stream can, over mutual TLS, to a device that installs from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.errors import DigestError, FedgeError, FetchError, FormatError, SlowError, TrustError
from fedge_client import delivery
from fedge_client.agent.identity import Identity
from fedge_client.delivery import Delivery
from fedge_client.device import Device
from fedge_client.installing import install
from fedge_client.runtime import Runtime
from fedge_client.updater import Pace

PACE = Pace(bytes_per_s=2000, window_s=0.4)
IN_FLIGHT = 2**20  # bytes, the whole file among them, that a liar gets rid of before it is cut off


async def endless(data: bytes, offset: int) -> AsyncIterator[bytes]:
    """All that was asked for, and no end after it."""
    yield data[offset:]
    while True:
        yield bytes(4096)


async def short(data: bytes, offset: int) -> AsyncIterator[bytes]:
    """Half of the file, whatever is asked for; it ends as a whole one does."""
    yield data[offset : len(data) // 2]


async def flipped(data: bytes, offset: int) -> AsyncIterator[bytes]:
    """One bit is another."""
    at = len(data) * 2 // 3
    yield (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])[offset:]


async def from_the_start(data: bytes, offset: int) -> AsyncIterator[bytes]:
    """A part of the file, always the first, and no more than was asked for."""
    yield data[: min(len(data) // 3 + 1, len(data) - offset)]


async def silent(data: bytes, offset: int) -> AsyncIterator[bytes]:
    """A little, and then nothing comes."""
    yield data[offset : offset + 10]
    await asyncio.Event().wait()


async def mute(_: bytes, __: int) -> AsyncIterator[bytes]:
    """Nothing comes."""
    await asyncio.Event().wait()
    yield b""


async def dripping(data: bytes, offset: int) -> AsyncIterator[bytes]:
    """A byte at a time, so that it never stands still."""
    for place in range(offset, len(data)):
        yield data[place : place + 1]
        await asyncio.sleep(0.02)


async def empty(_: bytes, __: int) -> AsyncIterator[bytes]:
    """Messages without a byte, as many as are taken."""
    while True:
        yield b""
        await asyncio.sleep(0.001)


async def in_one_piece(_: bytes, __: int) -> AsyncIterator[bytes]:
    """A message above the limit of a message."""
    yield bytes(8 * 2**20)


async def noise(data: bytes, offset: int) -> AsyncIterator[bytes]:
    """As many other bytes."""
    yield np.random.default_rng(0).bytes(max(len(data) - offset, 5000))


MODEL = {
    endless: FormatError,
    short: FetchError,
    flipped: DigestError,
    from_the_start: DigestError,
    silent: FetchError,
    mute: FetchError,
    dripping: SlowError,
    empty: SlowError,
    in_one_piece: FetchError,
    noise: DigestError,
}
METADATA = {
    endless: TrustError,
    short: TrustError,
    flipped: TrustError,
    silent: FetchError,
    mute: FetchError,
    dripping: SlowError,
    empty: SlowError,
    in_one_piece: FetchError,
    noise: TrustError,
}


@pytest.fixture
def two(agent: Any, hub: Any, publisher: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that runs version 1; version 2, of some 60 kB, is on offer."""
    monkeypatch.setattr(delivery, "STILL_S", 0.3)
    publisher.offer(1, answer=1)
    device = Device.create(agent.home, "micro", publisher.root)
    with Delivery(lambda: Identity.open(agent.home)) as service:
        install(device, service.fetch)
    model = tools.constant_model(2, filler=np.random.default_rng(0).bytes(60_000))
    entry, wire = tools.entry_of("micro", model)
    publisher.place(tools.release_of(2, (entry,)), (wire,))
    return device


def attempt(device: Device) -> None:
    with Delivery(lambda: Identity.open(device.home)) as service:
        install(device, service.fetch, pace=PACE)


def runs(home: Path) -> tuple[int, str]:
    runtime = Runtime.open(home)
    return runtime.release.version, runtime.infer(np.zeros((8, 8), np.uint8))[0].label


def refused(device: Device, hub: Any, expected: type[FedgeError]) -> None:
    """It is refused as expected, for little, and leaves what ran; the truth is taken afterwards."""
    with pytest.raises(expected):
        attempt(device)
    assert runs(device.home) == (1, "one")
    parts = device.home / "release" / "parts"
    assert sum(path.stat().st_size for path in parts.glob("*")) <= 70_000
    hub.releases.lies.clear()
    attempt(device)
    assert runs(device.home) == (2, "two")


@pytest.mark.slow
@pytest.mark.parametrize(("lie", "expected"), MODEL.items(), ids=lambda each: each.__name__)
def test_a_lie_about_a_model_costs_little_and_the_truth_is_taken_afterwards(
    two: Any, hub: Any, lie: Any, expected: type[FedgeError]
) -> None:
    hub.releases.lies[".model"], before = lie, hub.releases.sent
    refused(two, hub, expected)
    if lie is not in_one_piece:
        assert hub.releases.sent - before < IN_FLIGHT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timestamp.json", ".golden"])
@pytest.mark.parametrize(("lie", "expected"), METADATA.items(), ids=lambda each: each.__name__)
def test_a_lie_about_what_is_read_before_it_changes_nothing(
    two: Any, hub: Any, name: str, lie: Any, expected: type[FedgeError]
) -> None:
    hub.releases.lies[name] = lie
    refused(two, hub, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lie", [endless, mute, dripping, empty, in_one_piece, noise], ids=lambda each: each.__name__
)
def test_a_lie_in_place_of_a_delta_costs_the_fetching_of_the_whole(two: Any, hub: Any, lie: Any) -> None:
    hub.releases.lies["delta"] = lie
    attempt(two)
    assert ("1 to 2", 0) in hub.releases.fetched
    assert runs(two.home) == (2, "two")
