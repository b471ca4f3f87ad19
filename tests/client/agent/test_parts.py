"""The agent's parts by themselves: back-off, cache, outbox, state, status."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedge.errors import DigestError, FedgeError, FormatError, HealthError
from fedge.wire.v1.records_pb2 import Content, Failure, Object, Result
from fedge_client.agent import installation, state, status
from fedge_client.agent.connection import backoff
from fedge_client.agent.objects import ObjectCache
from fedge_client.agent.outbox import Outbox, is_message_id
from fedge_client.device import Device
from fedge_client.reports import Reports
from fedge_client.updater import folder

Sender = Callable[[int], AsyncGenerator[bytes, None]]


def test_the_bound_of_the_back_off_doubles_up_to_the_maximum() -> None:
    rng = random.Random(1)
    delays = [[backoff(attempt, 20.0, rng) for _ in range(2000)] for attempt in range(1, 8)]
    for bound, drawn in zip([1, 2, 4, 8, 16, 20, 20], delays, strict=True):
        assert 0 <= min(drawn) < 0.05 * bound
        assert 0.95 * bound < max(drawn) <= bound
    assert backoff(10**6, 60.0, rng) <= 60
    assert backoff(3, 60.0, random.Random(5)) == backoff(3, 60.0, random.Random(5))


def sender(data: bytes, asked: list[int] | None = None, break_at: int | None = None) -> Sender:
    async def send(offset: int) -> AsyncGenerator[bytes, None]:
        if asked is not None:
            asked.append(offset)
        for start in range(offset, len(data), 4):
            if break_at is not None and start >= break_at:
                raise ConnectionAbortedError
            yield data[start : start + 4]

    return send


def announced(data: bytes) -> Object:
    return Object(sha256=hashlib.sha256(data).digest(), size=len(data))


async def got(cache: ObjectCache, data: bytes, send: Sender | None = None) -> bytes:
    async with cache.held(announced(data), send or sender(data)) as path:
        assert path is not None
        return path.read_bytes()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_here_is_not_fetched_again_unless_its_bytes_have_changed(tmp_path: Path) -> None:
    asked: list[int] = []
    data = b"0123456789"

    async def go() -> None:
        cache = ObjectCache(tmp_path, 100)
        for _ in range(3):
            assert await got(cache, data, sender(data, asked)) == data
        (path,) = tmp_path.iterdir()
        path.write_bytes(b"damaged by the disk")
        assert await got(ObjectCache(tmp_path, 100), data, sender(data, asked)) == data

    asyncio.run(go())
    assert asked == [0, 0]


def test_a_part_is_completed_in_another_process(tmp_path: Path) -> None:
    asked: list[int] = []
    data = b"0123456789"
    (tmp_path / (hashlib.sha256(data).hexdigest() + ".part")).write_bytes(data[:4])
    assert asyncio.run(got(ObjectCache(tmp_path, 100), data, sender(data, asked))) == data
    assert asked == [4]


def test_the_longest_unused_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    first, second, third = b"a" * 40, b"b" * 40, b"c" * 40

    async def go() -> None:
        cache = ObjectCache(tmp_path, 100)
        async with cache.held(announced(first), sender(first)):
            await got(cache, second)
            os.utime(tmp_path / hashlib.sha256(first).hexdigest(), (1, 1))  # the oldest, but in use
            await got(cache, third)
            assert names(tmp_path) == {hashlib.sha256(x).hexdigest() for x in (first, third)}
            async with cache.held(announced(third), sender(third)):
                with pytest.raises(FedgeError, match="no room"):
                    await got(cache, second)
        with pytest.raises(FedgeError, match=r"over link\.max_cache_bytes"):
            await got(cache, b"d" * 101)

    asyncio.run(go())


def test_other_bytes_than_announced_leave_nothing(tmp_path: Path) -> None:
    async def go() -> None:
        cache = ObjectCache(tmp_path, 100)
        with pytest.raises(DigestError, match="do not have the digest"):
            await got(cache, b"right", sender(b"wrong"))
        with pytest.raises(FormatError, match="more came"):
            await got(cache, b"right", sender(b"right and more"))
        with pytest.raises(FormatError, match="only 2 came"):
            await got(cache, b"right", sender(b"ri"))
        with pytest.raises(FormatError, match="refused"):
            async with cache.held(Object(sha256=b"short", size=3), sender(b"abc")):
                pass

    asyncio.run(go())
    assert names(tmp_path) == set()


def test_answers_wait_in_order_and_unfinished_work_goes(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for name in ("b", "a"):
        folder = outbox.begin(name)
        (folder / hashlib.sha256(b"x").hexdigest()).write_bytes(b"x")
        outbox.put(name, Result(content=Content(object=announced(b"x")), seconds=2))
    outbox.begin("unfinished")
    outbox.put_in_memory("small", Result(failure=Failure(reason="no")))
    assert outbox.waiting() == ["b", "a", "small"]
    assert outbox.get("small")[1].failure.reason == "no"
    again = Outbox(tmp_path)
    assert again.waiting() == ["b", "a"]
    header, result = again.get("a")
    assert (header.message_id, result.seconds) == ("a", 2)
    assert again.path_of("a", result.content.object).read_bytes() == b"x"
    (tmp_path / "b" / "answer").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="the answer to b is damaged"):
        again.get("b")
    again.drop("a")
    assert names(tmp_path) == {"b"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\n", "x" * 65, "ä"])
def test_an_id_that_is_no_name_of_a_folder_is_none(name: str) -> None:
    assert not is_message_id(name)


def made(value: float) -> RecordDict:
    arrays = ArrayRecord({"v": Array(np.full(3, value, np.float32))})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"value": value})})


def value_of(records: RecordDict) -> tuple[float, float]:
    return float(records.array_records["arrays"]["v"].numpy()[0]), records.config_records["config"]["value"]  # type: ignore[return-value]


def test_a_run_finds_its_state_again_and_a_repeated_message_the_one_before_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not state.before(folder, "m1")
    state.after(folder, "m1", RecordDict())
    assert not folder.exists()  # nothing to keep
    state.after(folder, "m1", made(1.0))
    assert not state.before(folder, "m1")  # its answer was lost: begin again
    assert value_of(state.before(folder, "m2")) == (1.0, 1.0)
    state.after(folder, "m2", made(2.0))
    assert value_of(state.before(folder, "m2")) == (1.0, 1.0)
    state.after(folder, "m2", made(2.5))
    assert value_of(state.before(folder, "m3")) == (2.5, 2.5)
    state.after(folder, "m3", made(3.0))
    assert len(names(folder)) == 3  # two generations and the table
    (folder / "state.json").write_text("{}")
    with pytest.raises(FormatError, match="damaged; remove the folder"):
        state.before(folder, "m4")


@pytest.mark.slow
def test_only_one_agent_holds_a_home_and_others_see_it(tmp_path: Path) -> None:
    assert not status.is_running(tmp_path)
    assert status.read(tmp_path) == {}
    with status.only_agent(tmp_path):
        assert status.is_running(tmp_path)
        with pytest.raises(FedgeError, match="an agent runs here already"), status.only_agent(tmp_path):
            pass
    assert not status.is_running(tmp_path)
    (tmp_path / "agent-status.json").write_text("[]")
    with pytest.raises(FormatError, match="restart the agent"):
        status.read(tmp_path)


def test_a_release_that_stops_answering_after_its_commit_is_left_and_reported_unhealthy(
    tmp_path: Path, publisher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.offer(1, answer=1)
    device, fetch = Device.create(tmp_path / "device", "micro", publisher.root), folder(publisher.folder)
    assert installation.bring(device, fetch, 1).version == 1
    publisher.offer(2, answer=2)
    latency = installation._latency_ms

    def of(device: Device) -> float:
        if device.running()[0].release.version == 2:
            raise HealthError("its answers are no numbers")
        return latency(device)

    monkeypatch.setattr(installation, "_latency_ms", of)
    done = installation.bring(device, fetch, 2)
    assert (done.version, done.changed, done.fault) == (1, True, "")
    said = [(report.version, report.kind) for report in Reports(device.home).waiting()]
    assert said == [
        (1, "installed"), (1, "healthy"), (1, "latency_ms"), (2, "installed"), (2, "unhealthy"),
    ]  # fmt: skip
    again = installation.bring(device, fetch, 2)
    assert (again.version, "in quarantine" in again.fault) == (1, True)
