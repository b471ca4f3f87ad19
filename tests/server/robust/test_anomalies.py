"""Scores of updates: by hand, against plain formulas, and where they stand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.config import Config
from fedge.errors import ConfigError
from fedge.learning.messages import to_record
from fedge_server import strategies
from fedge_server.pipeline import round_line
from fedge_server.report import Standing, standings_of
from fedge_server.rounds.anomalies import around_the_median, scored, z_scores
from fedge_server.rounds.record import RoundRecord, Score
from fedge_server.strategies.robust import updates as tall
from fedge_server.strategies.robust.updates import Updates


def updates(vectors) -> list[Message]:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
    return [
        Message(
            RecordDict(
                {
                    "arrays": to_record({"w": np.array(vector[:1]), "b": np.array(vector[1:])}),
                    "metrics": MetricRecord({"num-examples": 1, "train_loss": 0.0}),
                }
            ),
            reply_to=Message(RecordDict(), node, "train"),
        )
        for node, vector in enumerate(vectors, 1)
    ]


def zero(vectors):
    return {"w": np.zeros(1), "b": np.zeros(len(vectors[0]) - 1)}


def test_z_scores_are_around_the_median_in_median_deviations():
    # Median 3, deviations 2, 1, 0, 1, 97: the median one is 1.
    found = z_scores(np.array([1.0, 2.0, 3.0, 4.0, 100.0]), 0.0)
    np.testing.assert_allclose(found * 1.4826, [-2, -1, 0, 1, 97])
    assert z_scores(np.ones(5), 0.5).tolist() == [0.0] * 5


def test_distances_and_angles_are_those_of_whole_vectors(monkeypatch):
    vectors = np.random.default_rng(0).normal(1.0, 1.0, (7, 9))
    monkeypatch.setattr(tall, "BLOCK_VALUES", 3 * 7)
    records = [message.content["arrays"] for message in updates(vectors)]
    away, cosines = around_the_median(Updates(records, to_record(zero(vectors))))
    m = np.median(vectors, axis=0)
    np.testing.assert_allclose(away, np.linalg.norm(vectors - m, axis=1))
    expected = vectors @ m / np.linalg.norm(vectors, axis=1) / np.linalg.norm(m)
    np.testing.assert_allclose(cosines, expected)


def crowd(*odd):
    rng = np.random.default_rng(1)
    return np.concatenate([rng.normal(1.0, 0.1, (16, 200)), np.array(odd)])


def test_far_near_and_turned_updates_stand_out_and_others_do_not():
    middle = np.median(crowd(np.ones(200))[:16], axis=0)
    for odd in (np.full(200, 3.0), middle, -np.ones(200), np.full(200, 1e30)):
        vectors = crowd(odd)
        found = scored(updates(vectors), zero(vectors))
        assert [score.client for score in found] == list(range(1, 18))
        assert found[-1].stands_out
        assert not any(score.stands_out for score in found[:-1])
    turned = scored(updates(crowd(-np.ones(200))), zero(crowd(np.ones(200))))[-1]
    assert turned.direction > 50
    near = scored(updates(crowd(middle)), zero(crowd(middle)))[-1]
    assert near.distance < -4 < near.direction < 4


def test_changes_count_and_not_weights():
    vectors, origin = crowd(np.full(200, 1.2)), {"w": np.full(1, 50.0), "b": np.full(199, 50.0)}
    moved = scored(updates(vectors + 50.0), origin)
    plain = scored(updates(vectors), zero(vectors))
    for one, other in zip(moved, plain, strict=True):
        assert (one.distance, one.direction) == pytest.approx((other.distance, other.direction), abs=0.02)


def test_equal_updates_and_updates_that_did_not_move_have_scores_of_nothing():
    for vectors in (np.ones((6, 3)), np.zeros((6, 3))):
        assert {(s.distance, s.direction) for s in scored(updates(vectors), zero(vectors))} == {(0.0, 0.0)}


@pytest.mark.parametrize("count", [1, 4, 1001])
def test_of_too_few_or_too_many_there_are_no_scores(count):
    assert scored(updates(np.ones((count, 2))), zero([[0, 0]])) == ()


SCORES = (Score(3, 1.0, 2.5), Score(4, -4.5, 0.0), Score(8, 0.0, 9.25), Score(9, 2.0, -30.0))


def test_they_stand_in_the_record_and_in_the_lines():
    record = RoundRecord(2, {"accuracy": 0.5, "loss": 1.0}, clients=4, anomalies=SCORES)
    assert record.conspicuous == (8, 4)
    plain = json.loads(json.dumps(record.to_json()))
    assert plain["anomalies"] == [[3, 1.0, 2.5], [4, -4.5, 0.0], [8, 0.0, 9.25], [9, 2.0, -30.0]]
    assert RoundRecord.from_json(plain).anomalies == SCORES
    assert round_line(Config(), record).endswith("2 stand out (clients 8, 4)")
    many = RoundRecord(1, {"accuracy": 0.5}, anomalies=tuple(Score(i, 9.0, 0.0) for i in range(7)))
    assert many.standing_out == "7 stand out (clients 0, 1, 2, 3, 4, ...)"
    assert "anomalies" not in RoundRecord(1, {}).to_json()


def test_the_report_ranks_clients_by_the_mean_of_their_scores():
    records = [RoundRecord(1, {}, anomalies=SCORES), RoundRecord(2, {}, anomalies=(Score(8, 1.0, 1.0),))]
    first, second, *_ = standings_of(records)
    assert first == Standing(8, rounds=2, stood_out=1, mean=5.125, largest=9.25)
    assert second == Standing(4, rounds=1, stood_out=1, mean=4.5, largest=4.5)
    assert (
        standings_of([RoundRecord(1, {}, anomalies=tuple(Score(i, 1.0, 0.0) for i in range(30)))])[-1].client
        == 9
    )
    assert standings_of([RoundRecord(1, {})]) == ()


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"mechanism": "central"}, r"anomalies.*without noise"),
        ({"secure_aggregation": True}, r"anomalies.*nobody sees a single update"),
    ],
)
def test_what_hides_single_updates_has_no_scores(privacy, said):
    config = {"privacy": privacy, "evaluate": {"anomalies": True}, "model": {"standardise": False}}
    with pytest.raises(ConfigError, match=said):
        strategies.build(Config.from_mapping(config), network=torch.nn.Linear(2, 2))
    quiet = Config.from_mapping({**config, "evaluate": {}})
    strategies.build(quiet, network=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["fedmedian", "krum", "geometricmedian", "centredclipping"])
def test_rules_that_need_single_updates_are_refused_under_masks_and_central_noise(name):
    for privacy in ({"mechanism": "central"}, {"secure_aggregation": True}):
        config = {"privacy": privacy, "strategy": {"name": name}, "model": {"standardise": False}}
        with pytest.raises(ConfigError, match="looks at single updates"):
            strategies.build(Config.from_mapping(config), network=torch.nn.Linear(2, 2))
