"""Passes that are decided by what rounds have shown: the rule by hand, what is measured, and whole runs."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from fedge.config import Config
from fedge.errors import ConfigError
from fedge.learning.messages import ARRAYS, to_record
from fedge.learning.state import arrays_of, digest
from fedge.wire.arrays import records_of
from fedge_server import strategies
from fedge_server.rounds import work
from fedge_server.rounds.closing import Collected
from fedge_server.rounds.record import RoundRecord
from fedge_server.rounds.validation import UnfitError, Valid
from fedge_server.rounds.work import MOST, SAMPLE, Look
from fedge_simulations import ray

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0xFED, 1  # Message() reads it
SLOW = {"seconds_per_example": 0.01, "up_bytes_per_s": 500.0, "down_bytes_per_s": 5000.0}


def passes(records, epochs):
    """In the next round of a run that begins with so many."""
    sections = {"rounds": {"local_work": "adaptive"}, "train": {"epochs": epochs}}
    return work.passes(records, Config.from_mapping(sections))


def record(number, made=None, answer_s=None, loss=1.0, agreement=0.5, *, counted=True):
    return RoundRecord(
        number, {"loss": loss}, passes=made, answer_s=answer_s, agreement=agreement, counted=counted
    )


def after(*rounds, start=1.0):
    """Records of the initial model, and of rounds given as (passes, seconds, loss, agreement)."""
    return [record(0, loss=start), *(record(i, *each) for i, each in enumerate(rounds, start=1))]


def test_the_first_two_rounds_tell_travelling_from_training():
    assert passes(after(), 3) == 3
    assert passes(after((3, 5.0)), 3) == 6
    assert passes(after((15, 5.0)), 15) == 7  # twice as many would be above MOST
    assert passes(after((1, 5.0)), 1) == 2


@pytest.mark.parametrize(
    ("first", "second", "loss", "agreement", "wanted"),
    [
        (5.0, 6.0, 1.0, 0.5, 4),  # 1 s for a pass, 4 s to travel
        (5.0, 6.0, 1.0, 0.8, 8),  # sqrt(.8 / .2) = 2
        (5.0, 6.0, 1.0, 0.2, 2),
        (5.0, 6.0, 0.25, 0.5, 2),  # the root of a quarter of the loss
        (5.0, 6.0, 1.0, -0.1, 1),  # clients go apart
        (1.0, 2.0, 1.0, 0.5, 1),  # nothing travels
        (9.0, 8.0, 1.0, 0.5, MOST),  # no pass takes any time that could be seen
        (5.0, 6.0, 9.0, 0.5, 4),  # a loss above the initial one adds nothing
    ],
)
def test_passes_take_as_long_as_travelling_does_and_more_where_clients_agree(
    first, second, loss, agreement, wanted
):
    assert passes(after((1, first, loss, agreement), (2, second, loss, agreement)), 1) == wanted


def test_it_is_decided_anew_after_five_rounds_and_halved_where_the_loss_has_not_fallen():
    begun = [(1, 9.0, 0.9), (2, 10.0, 0.8)]
    five = [(8, 16.0, 0.5)] * 5
    for n in range(1, 5):
        assert passes(after(*begun, *five[:n]), 1) == 8
    assert passes(after(*begun, *five), 1) == 6  # 8 sqrt(.5) = 5.7
    assert passes(after(*begun, *[(8, 16.0, 0.9)] * 5), 1) == 4
    assert passes(after(*begun, *[(1, 9.0, 0.9)] * 5), 1) == 1


def test_rounds_that_did_not_count_say_nothing():
    none = record(1, 1, 5.0, counted=False)
    assert passes([record(0), none], 1) == 1
    assert passes([record(0), record(1, 1, None)], 1) == 1


def looked_at(changes, origin, seconds=None):
    clock = itertools.count(0, 2) if seconds is None else iter(seconds)
    look = Look(origin, lambda: float(next(clock)))
    admit = look.around(lambda reply, _: Valid(records_of(reply.content, ArrayRecord), 1, 1, None))
    for change in changes:
        arrays = {name: (value + change[name]).astype(value.dtype) for name, value in origin.items()}
        admit(Message(RecordDict({ARRAYS: to_record(arrays)}), 1, "train"), Collected())
    return look


def test_agreement_is_the_mean_cosine_of_pairs():
    rng = np.random.default_rng(0)
    origin = {"a": rng.normal(size=(3, 4)), "n": np.zeros((), np.int64), "b": rng.normal(size=7)}
    changes = [{"a": rng.normal(size=(3, 4)), "n": 1, "b": rng.normal(size=7)} for _ in range(5)]
    flat = [np.concatenate([c["a"].reshape(-1), c["b"]]) for c in changes]
    expected = np.mean(
        [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in itertools.combinations(flat, 2)]
    )
    assert looked_at(changes, origin).agreement == pytest.approx(expected, abs=1e-9)


def test_of_one_client_or_of_changes_of_nothing_there_is_no_agreement():
    origin = {"a": np.ones(3)}
    assert looked_at([{"a": np.ones(3)}], origin).agreement is None
    assert looked_at([{"a": np.zeros(3)}] * 3, origin).agreement is None
    assert looked_at([{"a": np.full(3, i)} for i in range(1, 4)], origin).agreement == pytest.approx(1.0)


def test_of_large_models_every_so_many_th_value_is_compared():
    origin = {"a": np.zeros(SAMPLE, np.float32), "b": np.zeros(2 * SAMPLE + 1, np.float32)}
    changes = []
    for sign in (1, -1):  # every third value of all is looked at: positions 0, 3, ... of a, 2, 5, ... of b
        a, b = np.ones(SAMPLE), np.ones(2 * SAMPLE + 1)
        a[::3], b[-SAMPLE % 3 :: 3] = sign, sign
        changes.append({"a": a, "b": b})
    assert looked_at(changes, origin).agreement == pytest.approx(-1.0)


def test_the_median_of_valid_answers_is_taken_and_rejected_ones_are_not_looked_at():
    origin = {"a": np.zeros(3)}
    look = looked_at([{"a": np.ones(3)}] * 3, origin, seconds=[10.0, 11.0, 13.0, 40.0])
    assert look.answer_s == 3.0

    def reject(reply, collected):
        raise UnfitError("no")

    silent = Look(origin, lambda: 0.0)
    with pytest.raises(UnfitError):
        silent.around(reject)(Message(RecordDict(), 1, "train"), Collected())
    assert silent.answer_s is None
    assert silent.agreement is None


@pytest.mark.parametrize(
    "sections",
    [
        {"strategy": {"name": "fedsgd"}, "train": {"learning_rate": 0.05}},
        {"strategy": {"name": "fedbuff"}},
        {"strategy": {"name": "fedper"}},
        {"privacy": {"mechanism": "central"}, "model": {"standardise": False}},
        {"privacy": {"mechanism": "local"}, "model": {"standardise": False}},
        {"privacy": {"secure_aggregation": True}, "model": {"standardise": False}},
        {"rounds": {"fit_work": True, "deadline_s": 3.0}},
    ],
)
def test_what_hides_clients_or_decides_their_work_too_is_refused(sections, small):
    rounds = {**sections.pop("rounds", {}), "local_work": "adaptive"}
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    with pytest.raises(ConfigError, match=r"rounds\.local_work"):
        strategies.build(small(rounds=rounds, **sections), network=network)


@pytest.mark.slow
def test_ray_has_no_clock_to_decide_by(small):
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"rounds\.local_work"):
        ray.check(small(rounds={"local_work": "adaptive"}))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "fednova", "scaffold", "ditto", "fedmedian"])
def test_over_a_slow_link_clients_work_more_and_simulated_time_counts_it(strategy, small, learn, tmp_path):
    config = small(
        rounds={"count": 4, "local_work": "adaptive"}, scenario=SLOW, strategy={"name": strategy},
        train={"momentum": 0.0}, model={"standardise": False},
    )  # fmt: skip
    records = learn(config, tmp_path).records
    made = [record.passes for record in records]
    assert made[:2] == [1, 2]
    assert made[2] == made[3] > 2
    took = np.diff([0.0, *(record.simulated_s for record in records)])
    pass_s = took[1] - took[0]
    assert took[2] == pytest.approx(took[0] + (made[2] - 1) * pass_s)
    assert all(0 < record.agreement <= 1 for record in records)
    assert json.loads(json.dumps(records[-1].to_json()))["passes"] == made[-1]


@pytest.mark.slow
def test_where_nothing_travels_clients_make_one_pass(small, learn, tmp_path):
    records = learn(small(rounds={"count": 4, "local_work": "adaptive"}), tmp_path).records
    assert [record.passes for record in records] == [1, 2, 1, 1]


@pytest.mark.slow
def test_clients_one_by_one_are_told_the_same(small, learn, tmp_path):
    sections = {"rounds": {"count": 4, "local_work": "adaptive"}, "scenario": SLOW}
    together = learn(small(**sections), tmp_path / "v").records
    alone = learn(small(**sections, simulation={"engine": "sequential"}), tmp_path / "s").records
    assert [r.passes for r in together] == [r.passes for r in alone]
    assert together[-1].metrics["loss"] == pytest.approx(alone[-1].metrics["loss"], rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_decides_the_same(small, learn, tmp_path):
    config = small(
        rounds={"count": 9, "local_work": "adaptive"}, scenario={**SLOW, "speed_sigma": 0.5},
        clients={"count": 6},
    )  # fmt: skip
    whole = learn(config, tmp_path / "whole")
    for stop in (1, 4):
        with pytest.raises(Exception, match=r"^$"):  # the fixture's Interrupted
            learn(config, tmp_path / "cut", stop_after=stop)
    resumed = learn(config, tmp_path / "cut")
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))
    assert [_told(r) for r in resumed.records] == [_told(r) for r in whole.records]


def _told(record):
    return json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True)
