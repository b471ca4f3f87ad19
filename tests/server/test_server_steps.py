"""Server optimisers on numbers worked by hand: what they step, what they leave, what a lost round leaves."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.learning.messages import from_record, to_record
from fedge_server.strategies.fedavg import FedAdam, FedAvgM
from fedge_server.strategies.state import Remembered, capture


class Nodes:
    """Just enough of a Grid to configure a round."""

    def get_node_ids(self):
        return [1, 2]


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


def momentum():
    made = FedAvgM(server_momentum=0.5, min_train_nodes=1, min_available_nodes=1)
    made.parameter_names = ("w",)
    return made


def one_round(strategy, number, state, sent):
    """State after a round in which two clients send `sent`, pairs of (w, var)."""
    arrays = to_record({name: np.array([value]) for name, value in state.items()})
    strategy.configure_train(number, arrays, ConfigRecord({"a": 1}), Nodes())
    replies = []
    for node, (w, var) in enumerate(sent, start=1):
        content = RecordDict(
            {
                "arrays": to_record({"w": np.array([w]), "var": np.array([var])}),
                "metrics": MetricRecord({"num-examples": 1, "train_loss": 1.0}),
            }
        )
        replies.append(Message(content, reply_to=Message(RecordDict(), node, "train")))
    found, _ = strategy.aggregate_train(number, replies)
    return {name: float(value[0]) for name, value in from_record(found).items()}


def test_momentum_carries_a_parameter_on_and_no_running_variance():
    # w: 4 -> mean 2: step -2 -> 2; then mean 1: momentum .5 * 2 + 1 = 2 -> 0. var: 4 -> 2 -> 1, the means;
    # with momentum it would be 0, and then below.
    strategy = momentum()
    state = one_round(strategy, 1, {"w": 4.0, "var": 4.0}, [(1.0, 1.0), (3.0, 3.0)])
    assert state == {"w": 2.0, "var": 2.0}
    assert one_round(strategy, 2, state, [(1.0, 1.0), (1.0, 1.0)]) == {"w": 0.0, "var": 1.0}


def test_without_names_every_entry_is_stepped_as_flower_does():
    strategy = momentum()
    strategy.parameter_names = None
    state = one_round(strategy, 1, {"w": 4.0, "var": 4.0}, [(1.0, 1.0), (3.0, 3.0)])
    assert one_round(strategy, 2, state, [(1.0, 1.0), (1.0, 1.0)]) == {"w": 0.0, "var": 0.0}


def test_adam_steps_from_the_sent_parameters_and_takes_the_mean_of_the_rest():
    made = FedAdam(eta=0.1, min_train_nodes=1, min_available_nodes=1)
    made.parameter_names = ("w",)
    state = one_round(made, 1, {"w": 4.0, "var": 4.0}, [(5.0, 1.0), (5.0, 3.0)])
    assert state["var"] == 2.0
    # m = .1, v = .01: the bias correction of two steps makes .1 * sqrt(1 - .99^2) / (1 - .9^2) of eta
    step = 0.1 * np.sqrt(1 - 0.99**2) / (1 - 0.9**2) * 0.1 / (np.sqrt(0.01) + 1e-3)
    assert state["w"] == pytest.approx(4.0 + step)


@pytest.mark.parametrize("make", [momentum, lambda: FedAdam(min_train_nodes=1, min_available_nodes=1)])
def test_what_a_strategy_remembered_can_be_put_back(make):
    strategy = make()
    state = one_round(strategy, 1, {"w": 4.0, "var": 4.0}, [(1.0, 1.0), (3.0, 3.0)])
    before, remembered = capture(strategy), Remembered(strategy)
    one_round(strategy, 2, state, [(1e30, -1e30), (1.0, 1.0)])
    assert capture(strategy) != before
    remembered.put_back()
    assert capture(strategy) == before


def test_its_memory_is_saved_with_the_round():
    strategy = momentum()
    one_round(strategy, 1, {"w": 4.0, "var": 4.0}, [(1.0, 1.0), (3.0, 3.0)])
    assert b"momentum_vector" in capture(strategy)
