"""Large objects have their turn: so many at once over connections of their own, and everybody is served."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Any, ClassVar

import grpc
import pytest

from fedge.wire import BULK_BYTES
from fedge.wire.v1 import link_pb2 as link
from fedge_server.hub import lanes
from fedge_server.hub import link as link_module

FETCH, SUBMIT = link.TurnRequest.FETCH, link.TurnRequest.SUBMIT
PLACES, DEVICES = 4, 100


class Counting(lanes.Lanes):
    """Lanes that note how many transfers were in a place at once."""

    made: ClassVar[list[Counting]] = []

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self.now = self.most = self.served = 0
        self.made.append(self)

    def place(self, message_id: str = "") -> Any:
        return _Counted(self, super().place(message_id))


class _Counted:
    def __init__(self, counting: Counting, manager: Any) -> None:
        self._counting, self._manager = counting, manager

    async def __aenter__(self) -> Any:
        place = await self._manager.__aenter__()
        self._counting.now += 1
        self._counting.most = max(self._counting.most, self._counting.now)
        return place

    async def __aexit__(self, *error: Any) -> Any:
        self._counting.now -= 1
        self._counting.served += 1
        return await self._manager.__aexit__(*error)


async def turn(stub: Any, message_id: str, kind: int, sha256: bytes) -> link.TurnReply:
    """A turn that has come."""
    request = link.TurnRequest(message_id=message_id, kind=kind, sha256=sha256)  # type: ignore[arg-type]
    while not (reply := await stub.Turn(request)).granted:
        assert reply.wanted
    return reply  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_hundred_devices_are_served_and_never_more_at_once_than_there_are_places(
    hub: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Counting.made.clear()
    monkeypatch.setattr(link_module, "TRANSFERS", PLACES)
    monkeypatch.setattr(link_module, "Lanes", Counting)
    monkeypatch.setattr(link_module, "TURN_S", 0.2)  # most have to ask more than once
    model = os.urandom(2 * BULK_BYTES)
    sha = hashlib.sha256(model).digest()

    async def scenario(rig: Any) -> None:
        devices = [rig.device() for _ in range(DEVICES)]
        stubs = [device.stub() for device in devices]
        streams = [await device.connect(stub) for device, stub in zip(devices, stubs, strict=True)]
        await rig.run()
        for i, device in enumerate(devices):
            await rig.push(f"m{i}", to=device, data=model, max_result_bytes=len(model))

        async def serve(i: int) -> None:
            await turn(stubs[i], f"m{i}", FETCH, sha)
            bulk = devices[i].stub()
            request = link.FetchRequest(message_id=f"m{i}", sha256=sha)
            assert b"".join([chunk.data async for chunk in bulk.Fetch(request)]) == model
            await devices[i].channels.pop().close()
            await turn(stubs[i], f"m{i}", SUBMIT, sha)
            bulk = devices[i].stub()
            reply = await tools.submit(bulk, f"m{i}", tools.answer_of(model), model, step=30_000)
            assert reply.outcome == link.SubmitReply.ACCEPTED
            await devices[i].channels.pop().close()

        async with asyncio.timeout(120):
            await asyncio.gather(*(serve(i) for i in range(DEVICES)))
        assert [(kind.most, kind.served, kind.now) for kind in Counting.made] == [(PLACES, DEVICES, 0)] * 2
        for stream in streams:
            stream.leave()

    hub(scenario)


@pytest.mark.slow
def test_a_turn_waits_and_comes_when_a_place_is_free(
    hub: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "TRANSFERS", 1)
    monkeypatch.setattr(link_module, "TURN_S", 0.05)
    update = b"u" * 50_000
    sha = hashlib.sha256(update).digest()

    async def scenario(rig: Any) -> None:
        first, second = rig.device(), rig.device()
        stream = await first.welcome()
        await rig.run()
        await rig.push("m1", to=first)
        await rig.push("m2", to=second)
        assert (await turn(first.stub(), "m1", SUBMIT, sha)).offset == 0
        stub = second.stub()
        request = link.TurnRequest(message_id="m2", kind=SUBMIT, sha256=sha)
        reply = await stub.Turn(request)
        assert (reply.wanted, reply.granted) == (True, False)
        stream.leave()  # which gives back what was kept for it
        await turn(stub, "m2", SUBMIT, sha)
        reply = await tools.submit(second.stub(), "m2", tools.answer_of(update), update)
        assert reply.outcome == link.SubmitReply.ACCEPTED
        assert not (await stub.Turn(request)).wanted

    hub(scenario)


def test_a_turn_ends_at_once_when_its_message_is_closed(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "TRANSFERS", 1)
    monkeypatch.setattr(link_module, "TURN_S", 60.0)

    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        await rig.run()
        await rig.push("m1", "m2", to=device)
        stub = device.stub()
        await turn(stub, "m1", FETCH, b"s" * 32)
        waiting = asyncio.ensure_future(stub.Turn(link.TurnRequest(message_id="m2", kind=FETCH)))
        unknown = await stub.Turn(link.TurnRequest(message_id="m3", kind=FETCH))
        assert not unknown.wanted
        await rig.close_messages("m2")
        assert not (await asyncio.wait_for(waiting, 20)).wanted

    hub(scenario)


def test_a_turn_of_no_known_kind_is_refused(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await device.stub().Turn(link.TurnRequest(message_id="m1"))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    hub(scenario)
