"""SCAFFOLD's server on numbers worked by hand, and whom it tells that an answer was not counted."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.config import Train
from fedge.learning.messages import from_record, to_record
from fedge_server.strategies.scaffold import Scaffold
from fedge_server.strategies.state import capture, restore


class Nodes:
    """Just enough of a Grid to configure a round."""

    def __init__(self, *ids):
        self.ids = ids

    def get_node_ids(self):
        return list(self.ids)


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


def made(**options):
    return Scaffold(("w",), population=4, train=Train(), min_train_nodes=1, min_available_nodes=1, **options)


def asked(strategy, number, *nodes, state=((10.0,), (1.0,))):
    arrays = to_record({"w": np.array(state[0]), "mean": np.array(state[1])})
    sent = strategy.configure_train(number, arrays, ConfigRecord({"a": 1}), Nodes(*nodes))
    return {message.metadata.dst_node_id: message for message in sent}


def reply(node, weights, change, examples=1, mean=1.0):
    content = RecordDict(
        {
            "arrays": to_record({"w": np.array([weights]), "mean": np.array([mean])}),
            "metrics": MetricRecord({"num-examples": examples, "train_loss": 1.0}),
            "control": to_record({"w": np.array([change])}),
        }
    )
    return Message(content, reply_to=Message(RecordDict(), node, "train"))


def void_of(message):
    return message.content["config"].get("control-void")


def test_weights_and_control_move_by_mean_changes():
    # x: 10 + (2 + 6) / 2 = 14; c: 0 + 2 / 4 * (3 + 5) / 2 = 2, since two of four clients answered
    strategy = made()
    sent = asked(strategy, 1, 1, 2)
    assert from_record(sent[1].content["control"])["w"].tolist() == [0.0]
    found, metrics = strategy.aggregate_train(1, [reply(1, 12.0, 3.0, 1), reply(2, 16.0, 5.0, 9)])
    assert from_record(found)["w"].tolist() == [14.0]
    assert metrics["train_loss"] == 1.0
    sent = asked(strategy, 2, 3)
    assert from_record(sent[3].content["control"])["w"].tolist() == [2.0]


def test_the_servers_rate_and_weights_by_examples():
    # (1 * 2 + 3 * 6) / 4 = 5, half of it; c: 2 / 4 * (1 * 3 + 3 * 5) / 4 = 2.25; buffers: (1 * 1 + 3 * 5) / 4
    strategy = made(server_learning_rate=0.5, weighting="examples")
    asked(strategy, 1, 1, 2)
    found, _ = strategy.aggregate_train(1, [reply(1, 12.0, 3.0, 1), reply(2, 16.0, 5.0, 3, mean=5.0)])
    assert {name: value.tolist() for name, value in from_record(found).items()} == {
        "w": [12.5],
        "mean": [4.0],
    }
    assert strategy.control["w"].tolist() == [2.25]


def test_who_was_not_counted_is_told_from_which_round_on_until_it_is():
    strategy = made()
    asked(strategy, 1, 1, 2)
    strategy.aggregate_train(1, [reply(1, 10.0, 0.0)])
    sent = asked(strategy, 2, 1, 2, 3)
    assert [void_of(sent[node]) for node in (1, 2, 3)] == [None, 1, None]
    assert sent[2].content["config"]["a"] == 1
    strategy.aggregate_train(2, [reply(1, 10.0, 0.0)])  # neither 2 nor 3
    sent = asked(strategy, 3, 2, 3)
    assert [void_of(sent[node]) for node in (2, 3)] == [1, 2]
    strategy.aggregate_train(3, [reply(2, 10.0, 0.0), reply(3, 10.0, 0.0)])
    assert [void_of(message) for message in asked(strategy, 4, 1, 2, 3).values()] == [None] * 3


def test_a_round_that_was_given_up_counted_nobody():
    strategy = made()
    asked(strategy, 1, 1, 2)
    assert void_of(asked(strategy, 2, 2)[2]) == 1


def test_all_of_it_is_saved_with_the_round():
    strategy, again = made(), made()
    asked(strategy, 1, 2**64 - 1, 2)
    strategy.aggregate_train(1, [reply(2, 12.0, 3.0)])
    restore(again, capture(strategy))
    assert again.control["w"].tolist() == strategy.control["w"].tolist() != [0.0]
    assert void_of(asked(again, 2, 2**64 - 1)[2**64 - 1]) == 1


@pytest.mark.parametrize("bad", [{"server_learning_rate": 0.0}, {"weighting": "size"}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must be above 0"):
        made(**bad)
    with pytest.raises(ValueError, match=r"train\.optimizer = 'adam'"):
        Scaffold(("w",), 4, Train(optimizer="adam"))
