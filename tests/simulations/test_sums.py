"""Rounds in which one reply stands for many clients, and those that train together."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fedge.learning import local
from fedge.learning.state import arrays_of, digest
from fedge_simulations.course import Fate, Steady
from fedge_simulations.trainers import OneByOne, Sum

LINEAR = {
    "fedavg": {},
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {"server_momentum": 0.5},
    "fedadagrad": {},
    "fedadam": {},
    "fedyogi": {},
    "fedsgd": {"momentum": 0.9},
}


class Together(OneByOne):
    """So many jobs at once, by the device's own code."""

    def __init__(self, at_once: int) -> None:
        self.size = at_once

    def at_once(self, job):
        return self.size


class Adding(OneByOne):
    """Sums of the device's own code, with some clients failing."""

    can_sum = True

    def __init__(self, failing: frozenset[int] = frozenset()) -> None:
        self.failing, self.asked = failing, []

    def sum(self, job, clients):
        self.asked.append([client.node_id for client in clients])
        good = [client for client in clients if client.node_id not in self.failing]
        done = [local.fit(replace(job, examples=job.examples.take(c.indices), seed=c.seed)) for c in good]
        n = sum(each.examples for each in done)
        mean = {
            name: sum(np.float64(d.examples) * d.arrays[name] for d in done) / max(n, 1)
            for name in (done[0].arrays if done else ())
        }
        return Sum(
            {name: value.astype(job.state[name].dtype) for name, value in mean.items()},
            n,
            sum(d.loss * d.examples for d in done) / max(n, 1),
            len(good),
            {c.node_id: "weights are not finite" for c in clients if c.node_id in self.failing},
        )


def without_time(records):
    return [json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True) for record in records]


@pytest.mark.quick_where(at_once=(2,))
@pytest.mark.parametrize("at_once", [2, 100])
@pytest.mark.parametrize("name", ["fedavg", "fedmedian"])
def test_the_result_does_not_depend_on_how_many_train_together(name, at_once, small, learn, tmp_path):
    config = small(strategy={"name": name}, rounds={"count": 2, "fraction": 0.8})
    one, many = (
        learn(config, tmp_path / str(k), trainers=trainers)
        for k, trainers in enumerate((OneByOne(), Together(at_once)))
    )
    assert without_time(one.records) == without_time(many.records)
    assert one.model_sha256 == many.model_sha256


@pytest.mark.quick_where(name=("fedavg",))
@pytest.mark.parametrize("name", LINEAR)
def test_sums_give_the_model_of_single_updates_and_resume_bit_for_bit(name, small, learn, tmp_path):
    config = small(strategy={"name": name, **LINEAR[name]}, rounds={"count": 4, "cohort": 4})
    adding = Adding()
    whole = learn(config, tmp_path / "whole", trainers=adding)
    single = learn(config, tmp_path / "single", trainers=OneByOne())
    for summed, alone in zip(whole.records, single.records, strict=True):
        assert (summed.clients, summed.asked, summed.bytes_up) == (4, 4, alone.bytes_up)
        assert summed.bytes_down == alone.bytes_down
        assert summed.simulated_s == alone.simulated_s
        assert summed.train_loss == pytest.approx(alone.train_loss, rel=1e-4)
        assert summed.updates != alone.updates
    for name, value in arrays_of(whole.model.network).items():
        np.testing.assert_allclose(value, arrays_of(single.model.network)[name], rtol=2e-3, atol=2e-4)
    assert [len(asked) for asked in adding.asked] == [4] * 4
    with pytest.raises(Exception, match=r"^$"):
        learn(config, tmp_path / "cut", stop_after=2, trainers=Adding())
    resumed = learn(config, tmp_path / "cut", trainers=Adding())
    assert without_time(resumed.records) == without_time(whole.records)
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedmedian", "qfedavg"])
def test_who_needs_single_updates_gets_them(name, small, learn, tmp_path):
    adding = Adding()
    learned = learn(small(strategy={"name": name}, rounds={"count": 1}), tmp_path, trainers=adding)
    assert (learned.records[0].clients, adding.asked) == (5, [])


@pytest.mark.slow
def test_where_clients_change_their_answers_no_sums_are_made(small, learn, tmp_path):
    adding = Adding()
    learn(small(rounds={"count": 1}), tmp_path, tamper={1: lambda _, reply: reply}, trainers=adding)
    assert adding.asked == []


def test_a_client_that_fails_is_named_and_the_next_to_arrive_takes_its_place(small, learn, tmp_path):
    adding = Adding(failing=frozenset({2}))
    config = small(rounds={"count": 2, "quorum": 0.6})
    for record in learn(config, tmp_path, trainers=adding).records:
        assert (record.clients, record.asked, record.failures) == (3, 5, 2)
        assert [(r.client, r.reason) for r in record.rejected if r.client == 2] in (
            [],
            [(2, "client error: weights are not finite")],
        )
    assert any(2 in asked for asked in adding.asked)


def test_a_round_in_which_all_fail_does_not_count(small, learn, tmp_path):
    adding = Adding(failing=frozenset(range(1, 6)))
    with pytest.raises(Exception, match="did not count; the last: 5 of 5 rejected"):
        learn(small(), tmp_path, trainers=adding)


@pytest.mark.slow
def test_who_is_too_late_is_in_no_sum(small, learn, tmp_path):
    settings = {"rounds": {"count": 2, "deadline_s": 0.28}, "scenario": {"speed_sigma": 0.5}}
    summed, alone = (
        learn(small(**settings), tmp_path / str(k), trainers=trainers).records
        for k, trainers in enumerate((Adding(), OneByOne()))
    )
    assert [record.clients for record in summed] == [record.clients for record in alone]
    assert 0 < summed[0].clients < 5
    assert [record.simulated_s for record in summed] == [record.simulated_s for record in alone]


class Night(Steady):
    """Clients with even numbers come online after an hour."""

    def online(self, node_ids, clock_s):
        return [node for node in node_ids if clock_s >= 3600]

    def fates(self, node_ids, **_):
        return [Fate(1.0, lost="out of battery" if node_id == 4 else "") for node_id in node_ids]


@pytest.mark.slow
def test_a_round_waits_until_somebody_is_online_and_the_lost_are_named(small, learn, tmp_path, monkeypatch):
    from fedge_simulations import world

    monkeypatch.setattr(world.World, "course", lambda *_: Night())
    for trainers in (Adding(), OneByOne()):
        (record,) = learn(
            small(rounds={"count": 1}), tmp_path / type(trainers).__name__, trainers=trainers
        ).records
        assert (record.clients, record.simulated_s) == (4, 3602.0)
        assert [(r.client, r.reason) for r in record.rejected] == [(4, "client error: out of battery")]
