"""The parts by themselves: names of files, devices that wait, what streams may hold, kept deltas."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import places
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from places import Place

from fedge import delta
from fedge.errors import AbsentError, FedgeError, ForbiddenError, SealError
from fedge.sealing import DELTA, unseal
from fedge.sealing import Place as PlaceOf
from fedge_server.delivery import deltas as module
from fedge_server.delivery.deltas import Deltas
from fedge_server.delivery.sealing import Sealing
from fedge_server.delivery.shelf import Shelf, View, place_of
from fedge_server.delivery.streams import (
    BUDGET_BYTES,
    FIRST_CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    Streams,
    read,
)
from fedge_server.delivery.waiting import PER_DEVICE, Waiting
from fedge_server.repository.content_keys import ContentKeys

DIGEST = "a" * 64


@pytest.mark.parametrize(
    "name",
    [
        "metadata/timestamp.json",
        "metadata/1.root.json",
        "metadata/12.snapshot.json",
        "metadata/3.targets.json",
        "metadata/4.tier-micro.json",
        f"targets/micro/{DIGEST}.tier.json",
        f"targets/micro/{DIGEST}.7.model",
    ],
)
def test_a_device_may_have_what_all_need_and_what_is_its_tiers(name: str) -> None:
    assert "/".join(place_of(name, "micro")) == name


@pytest.mark.parametrize("name", ["metadata/4.tier-board.json", f"targets/board/{DIGEST}.7.model"])
def test_another_tiers_files_are_forbidden(name: str) -> None:
    with pytest.raises(ForbiddenError):
        place_of(name, "micro")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "metadata",
        "metadata/",
        "metadata/.timestamp.json.x",
        "metadata/../keys/root.key",
        "metadata/root.json",
        "metadata/0.root.json",
        "metadata/1.other.json",
        "state/used.json",
        f"targets/micro/../board/{DIGEST}.7.model",
        f"targets/../targets/micro/{DIGEST}.7.model",
        "targets/micro/tier.json",
        f"/targets/micro/{DIGEST}.7.model",
        f"targets/micro/{DIGEST}.7.model\n",
        f"targets/micro/{DIGEST}./etc/passwd",
        f"targets/micro/{DIGEST.upper()}.7.model",
    ],
)
def test_other_names_mean_nothing(name: str) -> None:
    with pytest.raises(AbsentError):
        place_of(name, "micro")


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["metadata", "targets", "..", ".", "micro", "board", "", "1.root.json"]), max_size=6
    ).map("/".join)
)
def test_no_name_leads_out_of_the_two_folders(name: str) -> None:
    try:
        parts = place_of(name, "micro")
    except (AbsentError, ForbiddenError):
        return
    assert parts[0] in ("metadata", "targets")
    assert not any(part in ("", ".", "..") or "/" in part for part in parts)


def test_a_link_or_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "metadata" / "1.root.json").symlink_to(tmp_path / "secret")
    (tmp_path / "metadata" / "2.root.json").mkdir()
    os.mkfifo(tmp_path / "metadata" / "3.root.json")
    for number in (1, 2, 3, 4):
        with pytest.raises(AbsentError):
            Shelf(tmp_path).open(f"metadata/{number}.root.json", "micro")


def test_the_view_follows_the_timestamp_and_is_empty_without_a_repository(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "repository")
    assert shelf.refresh() == View()
    assert shelf.root() == b""
    place = Place(tmp_path / "repository").make()
    assert (shelf.refresh().newest("micro"), shelf.view.floor("micro")) == (0, 0)
    release = place.publish(1, "micro", floors={"micro": 1})
    view = shelf.refresh()
    assert (view.newest("micro"), view.newest("board"), view.floor("micro")) == (release.version, 0, 1)
    assert view.offers("micro", 1)
    assert not view.offers("micro", 2)
    assert shelf.refresh() is view
    assert shelf.root() == place.first_root


# --- waiting


@pytest.mark.slow
def test_who_waits_is_woken_by_news_of_its_tier_alone() -> None:
    async def play() -> None:
        waiting = Waiting()
        micro = asyncio.create_task(waiting.wait("micro", "d1", waiting.news("micro"), 30))
        board = asyncio.create_task(waiting.wait("board", "d2", waiting.news("board"), 0.3))
        await asyncio.sleep(0.05)
        waiting.wake({"micro"})
        assert await micro is True
        assert await board is False
        assert len(waiting) == 0

    asyncio.run(play())


def test_news_between_look_and_wait_are_not_missed() -> None:
    async def play() -> None:
        waiting = Waiting()
        seen = waiting.news("micro")
        waiting.wake({"micro"})
        assert await waiting.wait("micro", "d1", seen, 30) is True

    asyncio.run(play())


def test_so_many_may_wait_in_all_and_of_each_device() -> None:
    async def play() -> None:
        waiting = Waiting(most=PER_DEVICE + 1)
        tasks = [asyncio.create_task(waiting.wait("micro", "d1", 0, 30)) for _ in range(PER_DEVICE)]
        await asyncio.sleep(0.01)
        assert not waiting.has_room("d1")
        assert waiting.has_room("d2")
        tasks.append(asyncio.create_task(waiting.wait("micro", "d2", 0, 30)))
        await asyncio.sleep(0.01)
        assert not waiting.has_room("d3")
        waiting.end_of({"d1"})  # revoked
        assert await tasks[0] is True
        await asyncio.sleep(0)
        assert waiting.devices() == {"d2"}
        tasks[-1].cancel()

    asyncio.run(play())


def test_a_fleet_that_is_woken_comes_back_over_seconds() -> None:
    async def play() -> None:
        waiting = Waiting()
        tasks = [asyncio.create_task(waiting.wait("micro", f"d{i}", 0, 30)) for i in range(800)]
        await asyncio.sleep(0.05)
        waiting.wake({"micro"})
        await asyncio.gather(*tasks)
        assert waiting.spread_s() == 2.0

    asyncio.run(play())


# --- streams


def test_chunks_begin_small_and_grow_within_the_share_of_all() -> None:
    streams = Streams()
    with streams.one("d1") as first:
        assert first is not None
        assert [first.next_bytes() for _ in range(3)] == [FIRST_CHUNK_BYTES, *[MAX_CHUNK_BYTES] * 2]
        streams.open = 500
        assert first.next_bytes() == BUDGET_BYTES // 500


def test_all_chunks_together_stay_within_the_budget() -> None:
    streams = Streams(most=5000, per_device=5000)
    for number in (1, 10, 100, 500, 1000):
        streams.open = number
        assert FIRST_CHUNK_BYTES <= streams.share <= MAX_CHUNK_BYTES
        assert number * streams.share <= max(BUDGET_BYTES, number * FIRST_CHUNK_BYTES)


def test_a_device_has_its_limit_and_all_have_theirs() -> None:
    streams = Streams(most=3, per_device=2)
    with streams.one("d1") as a, streams.one("d1") as b, streams.one("d1") as c:
        assert a is not None
        assert b is not None
        assert c is None
        with streams.one("d2") as d, streams.one("d3") as e:
            assert d is not None
            assert e is None
    assert streams.open == 0


def test_parts_of_files_are_read_as_they_are(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(300_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        for offset, length in ((0, 65536), (65536, 131072), (299_990, 10), (299_990, 50), (300_000, 5)):
            found = asyncio.run(read(file.fileno(), length, offset))
            assert found == data[offset : offset + length]


# --- deltas


def models(count: int) -> list[bytes]:
    """Int8 graphs of 60,000 weights, each a little further than the one before."""
    rng = np.random.default_rng(0)
    codes = np.clip(rng.normal(0, 16, (200, 300)).round(), -64, 64).astype(np.int8)
    found = []
    for _ in range(count):
        made = onnx.GraphProto(name="g")
        made.initializer.append(numpy_helper.from_array(codes, "w"))
        found.append(onnx.ModelProto(ir_version=10, graph=made).SerializeToString(deterministic=True))
        steps = rng.choice([-1, 0, 1], p=[0.02, 0.96, 0.02], size=codes.shape)
        codes = np.clip(codes + steps, -64, 64).astype(np.int8)
    return found


MODELS = models(3)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """A repository with three large versions of micro, and two small ones of board."""
    folder = tmp_path_factory.mktemp("deltas") / "repository"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(places, "model_of", lambda n: MODELS[n - 1] if n < 4 else b"small" * 50)
        place = Place(folder).make()
        for number in (1, 2, 3):
            place.publish(number, "micro")
        for number in (4, 5):
            place.publish(number, "board")
    found = Shelf(folder)
    found.refresh()
    return found


async def whole(deltas: Deltas, *pair: int, tier: str = "micro") -> bytes | None:
    found = await deltas.open(tier, *pair)
    if found is None:
        return None
    with os.fdopen(found[0], "rb") as file:
        return file.read()


@pytest.mark.slow
def test_a_delta_is_made_once_for_all_who_ask_and_kept(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = module._in_process

    async def counted(*args: Any) -> bytes:
        made.append(1)
        return await real(*args)

    monkeypatch.setattr(module, "_in_process", counted)

    async def play() -> None:
        deltas = Deltas(shelf, tmp_path / "deltas")
        first, again = await asyncio.gather(whole(deltas, 1, 3), whole(deltas, 1, 3))
        assert first is not None
        assert first == again
        assert delta.apply(MODELS[0], first, len(MODELS[2])) == MODELS[2]
        assert await whole(Deltas(shelf, tmp_path / "deltas"), 1, 3) == first  # by another hub
        assert made == [1]

    asyncio.run(play())


def test_there_is_none_for_small_files_unknown_versions_and_ways_down(shelf: Shelf, tmp_path: Path) -> None:
    async def play() -> None:
        deltas = Deltas(shelf, tmp_path / "deltas")
        for pair, tier in (
            ((3, 1), "micro"),
            ((2, 2), "micro"),
            ((1, 9), "micro"),
            ((4, 5), "board"),
            ((1, 2), "no"),
        ):
            assert await whole(deltas, *pair, tier=tier) is None
        assert await whole(Deltas(shelf), 1, 2) is None

    asyncio.run(play())


@pytest.mark.slow
def test_what_is_kept_is_bounded_and_goes_oldest_first(shelf: Shelf, tmp_path: Path) -> None:
    async def play() -> None:
        deltas = Deltas(shelf, tmp_path / "deltas", most_bytes=1)
        assert await whole(deltas, 1, 2)
        assert await whole(deltas, 2, 3)
        assert len(list((tmp_path / "deltas").iterdir())) == 1

    asyncio.run(play())


@pytest.mark.slow
def test_one_that_is_not_worth_it_is_remembered(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORTH", 0.0)

    async def play() -> None:
        assert await whole(Deltas(shelf, tmp_path / "deltas"), 1, 2) is None
        monkeypatch.setattr(module, "_in_process", None)  # would fail
        assert await whole(Deltas(shelf, tmp_path / "deltas"), 1, 2) is None

    asyncio.run(play())


@pytest.mark.slow
def test_the_delta_of_a_sealed_tier_opens_with_its_versions_key(tmp_path: Path) -> None:
    keys = ContentKeys(tmp_path / "keys")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(places, "model_of", lambda n: MODELS[n - 1])
        place = Place(tmp_path / "repository", options={"content_keys": keys}).make()
        for number in (1, 2):
            place.publish(number, "micro")
    shelf = Shelf(tmp_path / "repository")
    shelf.refresh()
    sealing = Sealing(shelf, keys)

    async def play() -> None:
        made = await whole(Deltas(shelf, tmp_path / "d", content=sealing.content, seal=sealing.delta), 1, 2)
        assert made is not None
        assert not made.startswith(delta.MAGIC)
        plain = unseal(made, keys.key("micro", 2), PlaceOf("micro", 2, DELTA))
        assert delta.apply(MODELS[0], plain, len(MODELS[1])) == MODELS[1]
        with pytest.raises(SealError):
            unseal(made, keys.key("micro", 1), PlaceOf("micro", 2, DELTA))

    asyncio.run(play())


def test_a_maker_that_fails_says_so(shelf: Shelf, tmp_path: Path) -> None:
    async def play() -> None:
        deltas = Deltas(shelf, tmp_path / "deltas", content=lambda *_: (b"no model", 100))
        with pytest.raises(FedgeError, match="delta"):
            await deltas.open("micro", 1, 2)

    asyncio.run(play())
