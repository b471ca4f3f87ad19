"""Asynchronous rounds: the arithmetic of FedBuff and FedAsync, and who is at work from which model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedge.errors import ConfigError, RoundError
from fedge.learning.messages import from_record, to_record
from fedge.learning.state import arrays_of, digest
from fedge_server import strategies
from fedge_server.strategies.asynchronous import FedAsync, FedBuff
from fedge_simulations.course import Fate
from fedge_simulations.scenario.events import Sending

UNEVEN = {"speed_sigma": 1.0, "seconds_per_example": 0.01}


def values(*numbers):
    return np.array(numbers, np.float64)


def test_an_update_counts_less_the_older_it_is():
    assert [FedBuff(exponent=0.5).discount(tau) for tau in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [FedBuff(staleness="hinge").discount(tau) for tau in (0, 4, 6)] == [1.0, 1.0, 1 / 21]
    assert FedAsync(staleness="constant").discount(100) == 1.0


def test_a_buffered_change_goes_on_top_of_the_newest_model():
    now, start, trained = values(10, 0), values(4, 0), values(6, -8)
    found = FedBuff(server_learning_rate=0.5).moved(now, start, trained, 3)  # 0.5 * 0.5 * (trained - start)
    assert found.tolist() == [10.5, -2.0]


def test_an_answer_is_mixed_into_the_newest_model_wherever_it_began():
    now, start, trained = values(10, 0), values(4, 0), values(6, -8)
    assert FedAsync(mixing=0.5).moved(now, start, trained, 0).tolist() == [8.0, -4.0]
    assert FedAsync(mixing=0.5).moved(now, start, trained, 3).tolist() == [9.0, -2.0]


@pytest.mark.parametrize(
    "options",
    [
        {"buffer": 0},
        {"max_staleness": -1},
        {"staleness": "linear"},
        {"exponent": -0.1},
        {"weighting": "loss"},
        {"server_learning_rate": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(options, small):
    with pytest.raises(ConfigError, match=next(iter(options))):
        strategies.build(small(strategy={"name": "fedbuff", **options}), network=_linear())


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"evaluate": {"federated": True}}, "evaluate.federated"),
        ({"privacy": {"mechanism": "local"}, "model": {"standardise": False}}, "privacy.mechanism"),
        ({"communication": {"codec": ["int8"]}}, "communication.codec"),
        ({"rounds": {"quorum": 0.5}}, "rounds.quorum"),
        ({"rounds": {"sampling": "poisson"}}, "rounds.sampling"),
        ({"rounds": {"min_updates": 11}}, "rounds.min_updates: is above the 10"),
    ],
)
def test_what_waits_for_a_whole_round_is_refused(sections, said, small):
    with pytest.raises(ConfigError, match=said):
        strategies.build(small(strategy={"name": "fedbuff"}, **sections), network=_linear())


def test_with_everybody_at_the_same_pace_a_full_buffer_is_federated_averaging(small, learn, tmp_path):
    buffered = small(strategy={"name": "fedbuff", "buffer": 5, "weighting": "examples"}, rounds={"count": 1})
    plain = small(strategy={"name": "fedavg"}, rounds={"count": 1})
    found, expected = (
        arrays_of(learn(config, tmp_path / str(i)).model.network)
        for i, config in enumerate((buffered, plain))
    )
    for name, value in expected.items():
        assert np.allclose(found[name], value, atol=1e-6)


@pytest.mark.quick_where(engine=("vector",))
@pytest.mark.parametrize("engine", ["vector", "sequential"])
def test_nobody_waits_for_the_slow_and_the_same_seed_gives_the_same(engine, small, learn, tmp_path):
    sections = {"clients": {"count": 8}, "scenario": UNEVEN, "simulation": {"engine": engine}}
    config = small(strategy={"name": "fedbuff", "buffer": 2}, rounds={"count": 12}, **sections)
    first, again = (learn(config, tmp_path / name) for name in ("first", "again"))
    assert [_told(r) for r in first.records] == [_told(r) for r in again.records]
    assert digest(arrays_of(first.model.network)) == digest(arrays_of(again.model.network))
    assert [record.clients for record in first.records] == [2] * 12
    assert max(record.staleness for record in first.records) >= 1
    waiting = learn(small(rounds={"count": 3}, **sections), tmp_path / "waiting")  # as many updates
    assert first.records[-1].simulated_s < 0.7 * waiting.records[-1].simulated_s
    assert first.records[-1].metrics["accuracy"] > 0.6


@pytest.mark.slow
def test_each_answer_is_a_step_of_fedasync(small, learn, tmp_path):
    config = small(strategy={"name": "fedasync", "proximal_mu": 0.01}, rounds={"count": 25}, scenario=UNEVEN)
    records = learn(config, tmp_path).records
    assert [record.clients for record in records] == [1] * 25
    assert records[-1].metrics["accuracy"] > 0.6


@pytest.mark.slow
def test_a_silent_client_is_given_up_at_the_deadline_and_another_takes_its_place(small, learn, tmp_path):
    config = small(
        strategy={"name": "fedbuff", "buffer": 2},
        clients={"count": 10},
        rounds={"count": 30, "cohort": 4, "deadline_s": 5.0},
        scenario={**UNEVEN, "silent": 0.4},
    )
    records = learn(config, tmp_path).records
    lost = [rejected for record in records for rejected in record.rejected]
    assert {rejected.reason for rejected in lost} == {"no answer in 5 s"}
    assert all(record.clients == 2 for record in records)
    assert all(record.failures == len(record.rejected) for record in records)


def test_where_everybody_is_silent_the_round_does_not_wait_for_ever(small, learn, tmp_path):
    config = small(
        strategy={"name": "fedbuff", "buffer": 1},
        clients={"count": 6},
        rounds={"count": 1, "cohort": 2, "deadline_s": 5.0},
        scenario={"silent": 0.7},
        seed=1,
    )
    (record,) = learn(config, tmp_path).records
    assert record.clients == 1
    assert record.simulated_s >= 0


@pytest.mark.slow
def test_an_update_that_is_too_old_is_rejected_with_its_age(small, learn, tmp_path):
    config = small(
        strategy={"name": "fedbuff", "buffer": 1, "max_staleness": 1}, rounds={"count": 15}, scenario=UNEVEN
    )
    records = learn(config, tmp_path).records
    reasons = {rejected.reason for record in records for rejected in record.rejected}
    assert any("began with the model of" in reason and "over 1" in reason for reason in reasons)
    assert max(record.staleness for record in records) <= 1


def test_a_client_that_sends_nan_is_rejected_and_the_round_goes_on(small, learn, tmp_path):
    def nan(_, reply):
        arrays = from_record(reply.content["arrays"])
        reply.content["arrays"] = to_record({k: np.full_like(v, np.nan) for k, v in arrays.items()})
        return reply

    config = small(strategy={"name": "fedbuff", "buffer": 4}, rounds={"count": 3}, scenario=UNEVEN)
    learned = learn(config, tmp_path, tamper={2: nan})
    rejected = {(r.client, "NaN" in r.reason) for record in learned.records for r in record.rejected}
    assert rejected == {(2, True)}
    assert all(np.isfinite(value).all() for value in arrays_of(learned.model.network).values())


@pytest.mark.slow
def test_a_run_that_is_taken_up_again_begins_with_nobody_at_work_and_repeats_itself(small, learn, tmp_path):
    config = small(strategy={"name": "fedbuff", "buffer": 2}, rounds={"count": 5}, scenario=UNEVEN)
    found = []
    for name in ("one", "other"):
        with pytest.raises(Exception, match=r"^$"):  # the fixture's Interrupted
            learn(config, tmp_path / name, stop_after=2)
        found.append(learn(config, tmp_path / name))
    assert [record.round for record in found[0].records] == [1, 2, 3, 4, 5]
    assert [_told(r) for r in found[0].records] == [_told(r) for r in found[1].records]
    assert found[0].records[2].staleness == 0  # nobody had begun before


def test_an_answer_that_never_comes_stands_in_the_record_of_events_as_null():
    sent = Sending(1, "train", 0.5, [3, 8], [Fate(math.inf), Fate(0.25)], None)
    assert b'"arrives_s":[null,0.25]' in sent.to_line()
    assert Sending.of_line(sent.to_line()) == sent


def _told(record):
    return {**record.to_json(), "seconds": 0}


def _linear():
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def broken(honest):
    """Around a ClientApp that fails whenever it is to train."""

    def call(message, context):
        if message.metadata.message_type == "train":
            raise RuntimeError("no disk")
        return honest(message, context)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedbuff", "fedasync"])
def test_where_every_client_fails_the_run_ends_with_the_reason(name, small, learn, tmp_path):
    with pytest.raises(RoundError, match=r"rounds in a row did not count; .*no disk"):
        learn(small(strategy={"name": name}, scenario=UNEVEN), tmp_path, around=broken)


@pytest.mark.slow
def test_a_round_closes_with_what_came_where_nearly_all_is_rejected(small, learn, tmp_path):
    def around(honest):
        return lambda message, context: (honest if context.node_id == 1 else broken(honest))(message, context)

    config = small(clients={"count": 8}, strategy={"name": "fedbuff", "buffer": 500}, scenario=UNEVEN)
    records = learn(config, tmp_path, around=around).records
    assert all(record.counted and 1 <= record.clients < 500 for record in records)
    assert all(80 <= len(record.rejected) < 90 for record in records)
