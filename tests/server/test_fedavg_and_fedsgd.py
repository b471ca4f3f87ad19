"""The two aggregations on numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from flwr.supercore.task_identity import TaskIdentity

from fedge.learning.messages import from_record, to_record
from fedge_server.strategies.fedavg import FedAvg, weighted_metrics
from fedge_server.strategies.fedsgd import FedSgd


class TwoNodes:
    """Just enough of a Grid to configure a round."""

    def get_node_ids(self):
        return [1, 2]


def reply(node: int, arrays: dict[str, list[float]], examples: int) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
    sent = Message(RecordDict(), node, "train")
    content = RecordDict(
        {
            "arrays": to_record({name: np.array(value, np.float32) for name, value in arrays.items()}),
            "metrics": MetricRecord({"num-examples": examples, "train_loss": 1.0}),
        }
    )
    return Message(content, reply_to=sent)


def fedsgd(**options) -> FedSgd:
    return FedSgd(("w",), fraction_train=1.0, **options)


def step(strategy: FedSgd, weights: dict[str, list[float]], replies: list[Message]) -> dict[str, list[float]]:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
    state = to_record({name: np.array(value, np.float32) for name, value in weights.items()})
    strategy.configure_train(1, state, ConfigRecord(), TwoNodes())
    found, _ = strategy.aggregate_train(1, replies)
    return {name: value.tolist() for name, value in from_record(found).items()}


def test_fedavg_weighs_by_examples():
    # (1 * 2 + 3 * 6) / 4 = 5; (1 * 4 + 3 * 0) / 4 = 1
    found, metrics = FedAvg().aggregate_train(1, [reply(1, {"w": [2, 4]}, 1), reply(2, {"w": [6, 0]}, 3)])
    assert from_record(found)["w"].tolist() == [5.0, 1.0]
    assert metrics["train_loss"] == 1.0


def test_fedavg_is_flowers_up_to_rounding_and_leaves_the_updates_as_they_are():
    rng = np.random.default_rng(0)
    arrays = [{"w": rng.normal(size=(3, 4)).tolist(), "b": rng.normal(size=()).tolist()} for _ in range(5)]
    replies = [reply(node, value, 10 + node) for node, value in enumerate(arrays)]
    ours, _ = FedAvg().aggregate_train(1, replies)
    theirs, _ = flower.FedAvg().aggregate_train(1, replies)
    for name in ("w", "b"):
        np.testing.assert_allclose(ours[name].numpy(), theirs[name].numpy(), rtol=1e-6, atol=1e-7)
        assert (
            from_record(replies[0].content["arrays"])[name].tolist() == np.float32(arrays[0][name]).tolist()
        )


def test_fedavg_averages_whole_numbers_as_flower_does():
    replies = [reply(1, {"w": [1]}, 1), reply(2, {"w": [4]}, 2)]
    for message, value in zip(replies, (1, 4), strict=True):
        message.content["arrays"] = to_record({"n": np.array([value], np.int64)})
    ours, _ = FedAvg().aggregate_train(1, replies)
    theirs, _ = flower.FedAvg().aggregate_train(1, replies)
    assert ours["n"].numpy() == pytest.approx(theirs["n"].numpy())
    assert ours["n"].dtype == theirs["n"].dtype


def test_metrics_are_averaged_as_flower_does_to_the_bit():
    rng = np.random.default_rng(1)
    contents = []
    for node in range(1, 8):
        message = reply(node, {"w": [0.0]}, 10 + node)
        message.content["metrics"] = MetricRecord(
            {"loss": rng.normal(), "num-examples": 10 + node, "many": rng.normal(size=3).tolist(), "n": node}
        )
        contents.append(message.content)
    ours, theirs = (f(contents, "num-examples") for f in (weighted_metrics, aggregate_metricrecords))
    assert dict(ours) == dict(theirs)
    assert "num-examples" not in ours


@pytest.mark.slow
def test_fedsgd_steps_along_the_mean_gradient():
    # mean gradient: (1 * 4 + 3 * 8) / 4 = 7; w = 10 - 0.5 * 7
    replies = [reply(1, {"w": [4]}, 1), reply(2, {"w": [8]}, 3)]
    assert step(fedsgd(learning_rate=0.5), {"w": [10]}, replies) == {"w": [6.5]}


def test_fedsgd_momentum_remembers_the_last_gradient():
    # v1 = 2, w1 = 1 - 0.1 * 2 = 0.8; v2 = 0.5 * 2 + 2 = 3, w2 = 0.8 - 0.1 * 3 = 0.5
    strategy = fedsgd(learning_rate=0.1, momentum=0.5)
    first = step(strategy, {"w": [1]}, [reply(1, {"w": [2]}, 5)])
    assert first["w"] == pytest.approx([0.8])
    assert step(strategy, first, [reply(1, {"w": [2]}, 5)])["w"] == pytest.approx([0.5])


def test_fedsgd_with_adam_moves_each_weight_by_the_learning_rate_at_first():
    # Adam's first step is lr * g / (|g| + eps): the sign of the gradient
    found = step(fedsgd(optimizer="adam", learning_rate=0.1), {"w": [1, 1]}, [reply(1, {"w": [5, -0.01]}, 2)])
    assert found["w"] == pytest.approx([0.9, 1.1], abs=1e-5)


def test_fedsgd_averages_what_is_no_parameter():
    replies = [reply(1, {"w": [0], "running_mean": [1]}, 1), reply(2, {"w": [0], "running_mean": [3]}, 1)]
    found = step(fedsgd(), {"w": [1], "running_mean": [9]}, replies)
    assert found == {"w": [1.0], "running_mean": [2.0]}


def test_fedsgd_equals_gradient_descent_on_the_pooled_data():
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(30, 4, generator=generator, dtype=torch.float64),
        torch.randn(30, generator=generator).double(),
    )
    weights = torch.zeros(4, dtype=torch.float64)

    def gradient(rows):
        return (2 * x[rows].T @ (x[rows] @ weights - y[rows]) / len(x[rows])).tolist()

    pooled = weights - 0.1 * torch.tensor(gradient(slice(0, 30)), dtype=torch.float64)
    parts = [reply(1, {"w": gradient(slice(0, 10))}, 10), reply(2, {"w": gradient(slice(10, 30))}, 20)]
    found = step(fedsgd(learning_rate=0.1), {"w": weights.tolist()}, parts)
    assert found["w"] == pytest.approx(pooled.tolist(), rel=1e-5)


@pytest.mark.parametrize("bad", [{"optimizer": "lion"}, {"learning_rate": 0.0}, {"momentum": 1.0}])
def test_fedsgd_refuses_settings_out_of_range(bad):
    with pytest.raises(ValueError):
        fedsgd(**bad)


def test_a_round_of_errors_gives_no_model():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
    failed = Message(Error(2, "no"), reply_to=Message(RecordDict(), 1, "train"))
    assert fedsgd().aggregate_train(1, [failed])[0] is None
