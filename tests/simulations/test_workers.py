"""Clients of a round in lanes, and worker processes that share them: nobody's work changes the sum."""

from __future__ import annotations

import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedge.config import Simulation
from fedge_simulations.engine import Engine, frames
from fedge_simulations.engine.lanes import LANES, Sums, cut
from fedge_simulations.trainers import Client


def clients(count: int, size: int = 3) -> list[Client]:
    return [Client(i + 1, np.arange(i, i + size), i) for i in range(count)]


@pytest.mark.parametrize("count", [1, 5, 16, 17, 100])
@pytest.mark.parametrize("at_once", [1, 7, 512])
@pytest.mark.parametrize("processes", [1, 2, 3, 16])
def test_every_client_is_in_one_part_and_its_lane_depends_on_its_place_alone(count, at_once, processes):
    ordered = clients(count)
    lane, seen = {}, 0
    for part in cut(ordered, at_once=at_once, processes=processes):
        for client, own in zip(part.clients, part.lane_of, strict=True):
            lane[client.node_id] = seen + own
        seen += part.lanes
    assert lane == {client.node_id: i % min(LANES, count) for i, client in enumerate(ordered)}


def test_there_is_something_to_do_for_every_process():
    assert [len(cut(clients(1000), at_once=512, processes=n)) for n in (1, 2, 4, 16)] == [2, 2, 4, 16]
    assert [len(cut(clients(3), at_once=512, processes=n)) for n in (1, 2, 16)] == [1, 3, 3]


def test_a_sum_is_the_same_to_the_last_bit_however_the_clients_are_cut():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(57, 11)).astype(np.float32))
    ordered, found = clients(57), []
    for at_once, processes in ((1, 1), (20, 1), (512, 1), (512, 2), (4, 7)):
        total = Sums.zero(1, 11)
        for part in cut(ordered, at_once=at_once, processes=processes):
            own = Sums.zero(part.lanes, 11)
            for start in range(0, len(part.clients), at_once):
                chosen = part.clients[start : start + at_once]
                places = [client.node_id - 1 for client in chosen]
                losses = [0.1 * place for place in places]
                own.add(rows[places], chosen, part.lane_of[start : start + at_once], losses)
            total.take(own)
        found.append((total.values.numpy().tobytes(), total.losses.tobytes(), total.examples.tobytes()))
    assert len(set(found)) == 1
    assert total.values[0].numpy() == pytest.approx(3 * rows.double().sum(0).numpy(), rel=1e-12)


def test_values_that_are_not_finite_stay_out_of_the_sum_and_are_named():
    rows = torch.tensor([[1.0, 2.0], [np.nan, 1.0], [4.0, 8.0]])
    sums = Sums.zero(2, 2)
    sums.add(rows, clients(3, size=2), [0, 1, 0], [0.5, 0.5, np.inf])
    assert sums.values.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert sums.clients.tolist() == [1, 0]
    assert sorted(sums.failed) == [2, 3]
    assert "not finite" in sums.failed[2]


def test_parts_and_sums_travel_whole():
    part = cut(clients(5), at_once=2, processes=2)[0]
    sums = Sums.zero(2, 3)
    sums.add(torch.ones(1, 3), clients(1), [1], [0.25])
    sums.failed[2**63 - 1] = "its battery is empty"
    pipe = io.BytesIO()
    frames.write(pipe, "part", frames.of_part(part))
    frames.write(pipe, "done", frames.of_sums(sums))
    pipe.seek(0)
    again = frames.part_of(frames.read(pipe)[1], part.lanes, part.longest)
    back = frames.sums_of(frames.read(pipe)[1])
    assert [c.node_id for c in again.clients] == [c.node_id for c in part.clients]
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(again.clients, part.clients, strict=True))
    assert again.lane_of == part.lane_of
    assert back.values.tolist() == [[0, 0, 0], [3, 3, 3]]
    assert (back.losses.tolist(), back.examples.tolist(), back.failed) == ([0, 0.75], [0, 3], sums.failed)
    with pytest.raises(EOFError):
        frames.read(pipe)


def until(engine: Engine, processes: int) -> None:
    end = time.monotonic() + 60
    while engine.workers.processes != processes:
        assert time.monotonic() < end, f"{engine.workers.processes} processes, not {processes}"
        time.sleep(0.05)


@pytest.mark.slow
def test_however_many_clients_are_stacked_their_sum_has_the_same_bits(digits_job):
    data, job, own = digits_job()
    sums = [Engine(Simulation(workers=1, clients_at_once=k), data).sum(job, own) for k in (1, 2, 5, 21)]
    assert len({sum_.loss for sum_ in sums}) == 1
    for name, value in sums[0].mean.items():
        assert all(np.array_equal(sum_.mean[name], value) for sum_ in sums)


@pytest.mark.slow
def test_workers_give_the_same_sum_to_the_last_bit_and_one_that_is_killed_loses_nothing(digits_job):
    data, job, own = digits_job()
    alone = Engine(Simulation(workers=1), data).sum(job, own)
    said: list[str] = []
    engine = Engine(Simulation(workers=3), data, say=said.append)
    engine.sum(job, own)
    until(engine, 3)
    ids = [hired.process.pid for hired in engine.workers.hired]
    for sum_ in (engine.sum(job, own), _after_a_kill(engine, ids[0], job, own), engine.sum(job, own)):
        assert (sum_.loss, sum_.examples, sum_.clients) == (alone.loss, alone.examples, alone.clients)
        assert all(np.array_equal(value, alone.mean[name]) for name, value in sum_.mean.items())
    assert engine.workers.processes == 2
    assert len(said) == 1
    assert "ended with -9" in said[0]
    engine.close()
    assert engine.workers.processes == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ids)


def _after_a_kill(engine, pid, job, own):
    os.kill(pid, signal.SIGKILL)
    return engine.sum(job, own)


@pytest.mark.slow
def test_a_task_that_workers_cannot_load_is_trained_without_them(digits_job):
    data, job, own = digits_job(task="no_such_module:TASK")
    said: list[str] = []
    engine = Engine(Simulation(workers=2), data, say=said.append)
    before = engine.sum(job, own)
    end = time.monotonic() + 60
    while not said:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "no_such_module" in said[0]
    assert "cannot be loaded" in said[0]
    assert np.array_equal(next(iter(engine.sum(job, own).mean.values())), next(iter(before.mean.values())))


def test_no_process_is_started_for_little_work_or_when_one_is_asked_for(digits_job):
    data, job, own = digits_job()
    for settings in (Simulation(), Simulation(workers=1)):
        engine = Engine(settings, data, rounds=1_000_000 if settings.workers else 2)
        engine.sum(job, own)
        assert engine.workers.hired == []


@pytest.mark.slow
def test_workers_that_are_not_ready_yet_end_without_a_word(digits_job):
    data, job, own = digits_job()
    said: list[str] = []
    engine = Engine(Simulation(workers=2), data, say=said.append)
    engine.sum(job, own)
    (hired,) = engine.workers.hired
    folder = Path(hired.process.args[3])  # type: ignore[index]
    assert folder.exists()
    engine.close()
    assert not folder.exists()
    assert hired.process.poll() is not None
    time.sleep(0.2)  # for the thread that waited for it
    assert said == []


@pytest.mark.slow
def test_an_answer_that_cannot_be_read_gives_the_part_back(digits_job):
    data, job, own = digits_job()
    alone = Engine(Simulation(workers=1), data).sum(job, own)
    said: list[str] = []
    engine = Engine(Simulation(workers=2), data, say=said.append)
    engine.sum(job, own)
    until(engine, 2)
    (hired,) = engine.workers.hired
    hired.process.stdout.close()  # type: ignore[union-attr]  # reading it is a ValueError, as a bad answer may be
    found = engine.sum(job, own)
    engine.close()
    assert all(np.array_equal(value, alone.mean[name]) for name, value in found.mean.items())
    assert len(said) == 1
    assert "ValueError" in said[0]
