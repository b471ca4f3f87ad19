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


def test_a_place_is_kept_for_the_transfer_whose_turn_has_come() -> None:
    async def scenario() -> None:
        found = Lanes(1)
        assert await found.turn("m1", 1, 0.0)
        assert await found.turn("m1", 1, 0.0)  # asked again: the same place
        assert not await found.turn("m2", 2, 0.01)
        async with asyncio.timeout(5), found.place("m1") as first:
            assert first.fast
            assert not await found.turn("m2", 2, 0.01)
        assert await found.turn("m2", 2, 5.0)

    asyncio.run(scenario())


def test_who_asks_again_keeps_their_place_in_the_line() -> None:
    async def scenario() -> None:
        found = Lanes(1)
        async with found.place():
            assert not await found.turn("early", 1, 0.01)
            assert not await found.turn("late", 2, 0.01)
            assert not await found.turn("early", 1, 0.01)
        assert not await found.turn("late", 2, 0.01)
        assert await found.turn("early", 1, 5.0)

    asyncio.run(scenario())


def test_a_transfer_that_does_not_wait_for_its_turn_keeps_its_place_in_the_line() -> None:
    async def scenario() -> None:
        found = Lanes(1)
        async with found.place():
            assert not await found.turn("m1", 1, 0.01)
            other = asyncio.ensure_future(found.turn("m2", 2, 5.0))
            await asyncio.sleep(0)
            early = found.place("m1")
            waiting = asyncio.ensure_future(early.__aenter__())
        async with asyncio.timeout(5):
            await waiting
        assert not other.done()
        await early.__aexit__(None, None, None)
        assert await other

    asyncio.run(scenario())


def test_a_turn_that_is_not_used_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "KEPT_S", 0.05)

    async def scenario() -> None:
        found = Lanes(1)
        assert await found.turn("m1", 1, 0.0)
        assert await found.turn("m2", 2, 5.0)
        async with asyncio.timeout(5), found.place("m2"):
            assert not await found.turn("m3", 3, 0.1)  # a transfer that has begun loses nothing
            assert not await found.turn("m1", 1, 0.0)  # and who came too late is last
        assert await found.turn("m3", 3, 5.0)

    asyncio.run(scenario())


def test_a_device_that_leaves_gives_back_what_is_kept_for_it() -> None:
    async def scenario() -> None:
        found = Lanes(1)
        assert await found.turn("m1", 1, 0.0)
        waits = asyncio.ensure_future(found.turn("m2", 1, 5.0))
        other = asyncio.ensure_future(found.turn("m3", 3, 5.0))
        await asyncio.sleep(0)
        found.give_back(1)
        assert await other
        assert not await waits
        found.give_back(3)
        async with asyncio.timeout(5), found.place("m4") as place:
            assert place.fast

    asyncio.run(scenario())


def test_a_message_that_nobody_waits_for_has_no_turn() -> None:
    async def scenario() -> None:
        found = Lanes(1)
        assert await found.turn("m1", 1, 0.0)
        waits = asyncio.ensure_future(found.turn("m2", 2, 5.0))
        await asyncio.sleep(0)
        found.forget("m2")
        assert not await waits
        found.forget("m1")
        found.forget("m1")
        async with asyncio.timeout(5), found.place("m3"):
            assert not await found.turn("m4", 4, 0.01)

    asyncio.run(scenario())


def test_a_transfer_that_ends_while_it_waits_takes_no_place() -> None:
    async def scenario() -> None:
        found = Lanes(1)
        async with found.place():
            first = found.place("m1")
            waiting = asyncio.ensure_future(first.__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
        async with asyncio.timeout(5), found.place("m2") as place:
            second = found.place("m3")
            waiting = asyncio.ensure_future(second.__aenter__())
            await asyncio.sleep(0)
            place.leave()
            waiting.cancel()  # at the moment when its place comes
            await asyncio.wait([waiting])
        async with asyncio.timeout(5), found.place("m4") as place:
            assert place.fast

    asyncio.run(scenario())


def test_bytes_that_trickle_are_a_stall_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(lanes.time, "monotonic", lambda: clock[0])
    freed: list[int] = []
    place = lanes.Place(lambda: freed.append(1), _began=0.0)
    place.moved(1)
    clock[0] = lanes.SLOW_S - 0.1
    place.moved(1)  # too early to tell
    assert place.fast
    clock[0] = lanes.SLOW_S + 0.1
    place.moved(1)
    assert not place.fast
    place.moved(1)
    assert freed == [1]
    steady = lanes.Place(lambda: freed.append(2), _began=clock[0])
    for _ in range(100):
        clock[0] += 1.0
        steady.moved(2 * lanes.SLOW_BYTES_PER_S)
    assert steady.fast


def test_a_device_has_so_many_at_once_and_others_are_not_counted_with_it() -> None:
    few = lanes.Few(2)
    with few.one(1) as first, few.one(1) as second, few.one(1) as third, few.one(2) as other:
        assert (first, second, third, other) == (True, True, False, True)
    with few.one(1) as again:
        assert again
