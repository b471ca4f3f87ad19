"""Requests together, none lost: batches, failures, callers that leave, releases that are let go."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.errors import AbsentError, BusyError, ConfigError, DigestError, FedgeError, FormatError
from fedge.spec import Spec
from fedge_server.inference.batching import Batcher
from fedge_server.inference.exports import Exports, loader
from fedge_server.inference.limits import Limits
from fedge_server.inference.models import Loaded, Models

SPEC = Spec("features", (1,), "float32", ("a", "b"))


def x_of(*values: float) -> Any:
    return np.array(values, np.float32).reshape(-1, 1)


class Model:
    """Gives each example its own number back; 13 makes it fail."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, x: Any) -> Any:
        assert self.go.wait(20)
        self.sizes.append(len(x))
        if (x == 13).any():
            raise FormatError("model: cannot be run")
        if (x == 14).any():
            raise ZeroDivisionError
        return np.concatenate([x, 1 - x], axis=1)


def scenario_of(work: Any, **limits: Any) -> Any:
    model = Model()

    async def scenario() -> Any:
        with ThreadPoolExecutor(1) as executor:
            return await work(Batcher(model, executor, Limits(**limits)), model)

    return asyncio.run(scenario())


def test_requests_that_come_together_are_run_together_and_each_gets_its_own() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        asked = [batcher.ask(x_of(-i, -i - 0.5)) for i in range(20)]
        for i, rows in enumerate(await asyncio.gather(*asked)):
            assert rows[:, 0].tolist() == [-i, -i - 0.5]
        assert model.sizes == [16, 16, 8]
        assert batcher.idle

    scenario_of(work, batch_examples=16, batch_wait_s=0.01)


def test_a_lone_request_waits_no_longer_than_the_bound_and_a_large_one_is_cut() -> None:
    async def large(batcher: Batcher, model: Model) -> None:
        values = [i + 100 for i in range(40)]
        assert (await batcher.ask(x_of(*values)))[:, 0].tolist() == values
        assert model.sizes == [16, 16, 8]

    scenario_of(large, batch_examples=16)


@pytest.mark.parametrize("bad", [13.0, 14.0, float("nan")])
def test_a_request_that_fails_spoils_no_other_of_its_batch(bad: float) -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        asked = [batcher.ask(x_of(i)) for i in (1, bad, 3)]
        first, failed, third = await asyncio.gather(*asked, return_exceptions=True)
        assert (first[0, 0], third[0, 0]) == (1, 3)  # type: ignore[index]
        assert isinstance(failed, FedgeError)
        assert len(model.sizes) == 4  # together, then each alone

    scenario_of(work)


def test_more_than_may_wait_is_refused_at_once_and_who_leaves_makes_room() -> None:
    async def work(batcher: Batcher, model: Model) -> None:
        model.go.clear()
        running = asyncio.create_task(batcher.ask(x_of(1)))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(batcher.ask(x_of(*[i] * 4))) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="8 examples wait"):
            await batcher.ask(x_of(9))
        waiting[0].cancel()
        model.go.set()
        assert (await running)[0, 0] == 1
        assert (await waiting[1])[:, 0].tolist() == [1] * 4
        assert model.sizes == [1, 4]  # what was given up was not run

    scenario_of(work, waiting_examples=8, max_examples=8, batch_wait_s=0.0)


def test_of_the_open_releases_the_least_recently_used_idle_one_is_let_go() -> None:
    opened: list[int] = []
    model = Model()

    def load(version: int) -> Loaded:
        opened.append(version)
        if version == 9:
            raise AbsentError("there is no release 9")
        return Loaded(version, "", "t", SPEC, frozenset(), model, size=100)

    async def scenario() -> None:
        models = Models(load, lambda tier: 1, Limits(models=2, model_bytes=250))
        for version in (1, 2, 1, 3, 1):
            await models.get(version)
        assert (opened, models.versions) == ([1, 2, 3], (3, 1))
        with pytest.raises(AbsentError):
            await models.get(9)
        entries = await asyncio.gather(*(models.get(4) for _ in range(5)))
        assert len(set(map(id, entries))) == 1  # loaded once for all who wait
        model.go.clear()
        held = list(models.versions)
        busy = [asyncio.create_task((await models.get(v)).batcher.ask(x_of(1))) for v in held]
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError, match="no room"):
            await models.get(5)
        model.go.set()
        await asyncio.gather(*busy)
        models.close()

    asyncio.run(scenario())


def test_a_large_release_takes_the_place_of_several() -> None:
    def load(version: int) -> Loaded:
        return Loaded(version, "", "t", SPEC, frozenset(), Model(), size=100 * version)

    async def scenario() -> None:
        models = Models(load, lambda tier: 1, Limits(models=9, model_bytes=600))
        for version in (1, 2, 3, 5):
            await models.get(version)
        assert models.versions == (5,)
        models.close()

    asyncio.run(scenario())


def test_exports_are_found_by_their_model_and_held_to_their_digest(tmp_path: Path, tools: Any) -> None:
    exports = Exports(tmp_path)
    data = tools.constant_model(2)
    entry, _ = tools.entry_of("micro", data)
    release = tools.release_of(3, (entry,))
    digest = release.lineage.global_model
    load = loader(exports, lambda version: release)
    with pytest.raises(AbsentError, match="was not exported"):
        load(3)
    exports.put(digest, tools.constant_model(1))
    exports.put(digest, data)
    assert exports.has(digest)
    assert len(list(tmp_path.iterdir())) == 1
    found = load(3)
    assert (found.version, found.model, found.tiers, found.size) == (3, digest, {"micro"}, len(data))
    assert found.run(np.zeros((2, 8, 8), np.uint8)).argmax(1).tolist() == [2, 2]
    path = next(tmp_path.iterdir())
    path.write_bytes(data[:-1])
    with pytest.raises(DigestError, match="damaged"):
        load(3)


@pytest.mark.parametrize(
    "values", [{"models": 0}, {"batch_wait_s": -1.0}, {"deadline_s": 0.0}, {"waiting_examples": 10}]
)
def test_limits_that_are_none_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="inference"):
        Limits(**values)
