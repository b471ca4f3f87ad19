"""Places for transfers: bounded, and given up by those that have become slow."""

from __future__ import annotations

import asyncio

import pytest

from fedge.wire import CHUNK_BYTES
from fedge_server.hub import lanes
from fedge_server.hub.lanes import SLOW_CHUNK_BYTES, Lanes


def test_no_more_transfers_than_places_are_fast() -> None:
    async def scenario() -> None:
        found = Lanes(1)
        async with found.place() as first:
            assert first.chunk_bytes == CHUNK_BYTES
            manager = found.place()
            second = asyncio.ensure_future(manager.__aenter__())
            await asyncio.sleep(0)
            assert not second.done()
        assert (await asyncio.wait_for(second, 5)).fast

    asyncio.run(scenario())


def test_a_stalled_chunk_makes_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "SLOW_S", 0.05)

    async def scenario() -> None:
        found = Lanes(1)
        async with found.place() as stalled:
            with stalled.chunk():
                async with asyncio.timeout(5), found.place() as other:
                    assert other.fast
            assert stalled.chunk_bytes == SLOW_CHUNK_BYTES
        async with asyncio.timeout(5), found.place() as again:  # given back once, not twice
            manager = found.place()
            waiting = asyncio.ensure_future(manager.__aenter__())
            await asyncio.sleep(0)
            assert not waiting.done()
            with again.chunk():
                pass
            assert again.fast
            waiting.cancel()

    asyncio.run(scenario())
