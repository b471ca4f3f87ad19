"""FedNova on numbers worked by hand, and against the paper's own form in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.config import Train
from fedge.learning.messages import from_record, to_record
from fedge.learning.terms import accumulated
from fedge_server.strategies.fedavg import FedAvg
from fedge_server.strategies.fednova import FedNova

PLAIN = Train(momentum=0.0)


class TwoNodes:
    """Just enough of a Grid to configure a round."""

    def get_node_ids(self):
        return [1, 2]


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


def reply(node, arrays, examples, steps):
    content = RecordDict(
        {
            "arrays": to_record({name: np.asarray(value) for name, value in arrays.items()}),
            "metrics": MetricRecord({"num-examples": examples, "train_loss": 1.0, "steps": steps}),
        }
    )
    return Message(content, reply_to=Message(RecordDict(), node, "train"))


def step(strategy, weights, replies):
    state = to_record({name: np.asarray(value) for name, value in weights.items()})
    strategy.configure_train(1, state, ConfigRecord(), TwoNodes())
    return from_record(strategy.aggregate_train(1, replies)[0])


def test_who_makes_more_steps_goes_no_farther_as_worked_by_hand():
    # p = 1/2 each; D = 4 after 1 step and 4 after 4: d = 4 and 1, mean 2.5; tau_eff = 2.5; w = 10 + 6.25
    replies = [reply(1, {"w": [14.0]}, 5, 1), reply(2, {"w": [14.0]}, 5, 4)]
    assert step(FedNova(("w",), PLAIN), {"w": [10.0]}, replies)["w"] == pytest.approx([16.25])


def test_partial_work_is_weighted_by_what_was_done():
    # Client 2 holds 3 of 4 examples and did 2 of 8 steps: d = 8/8 and 6/2; 0.25 * 1 + 0.75 * 3 = 2.5;
    # tau_eff = 0.25 * 8 + 0.75 * 2 = 3.5; w = 0 + 8.75. FedAvg would say 0.25 * 8 + 0.75 * 6 = 6.5.
    replies = [reply(1, {"w": [8.0]}, 10, 8), reply(2, {"w": [6.0]}, 30, 2)]
    assert step(FedNova(("w",), PLAIN), {"w": [0.0]}, replies)["w"] == pytest.approx([8.75])


def test_with_equal_steps_it_is_fedavg():
    rng = np.random.default_rng(0)
    replies = [reply(i, {"w": rng.normal(size=6)}, 3 + i, 7) for i in range(5)]
    found = step(FedNova(("w",), Train(momentum=0.9)), {"w": rng.normal(size=6)}, replies)
    average = from_record(FedAvg().aggregate_train(1, replies)[0])
    assert found["w"] == pytest.approx(average["w"], rel=1e-14)


def test_buffers_are_averaged_by_examples():
    replies = [reply(1, {"w": [0.0], "var": [1.0]}, 1, 1), reply(2, {"w": [0.0], "var": [5.0]}, 3, 9)]
    assert step(FedNova(("w",), PLAIN), {"w": [0.0], "var": [9.0]}, replies)["var"].tolist() == [4.0]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_the_accumulated_steps_are_those_of_torchs_momentum(momentum, steps):
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=momentum)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert accumulated(steps, Train(momentum=momentum)) == pytest.approx(-weight.item() / 0.5, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_the_papers_formula_in_float64(momentum):
    """w - tau_eff sum p_k eta G_k a_k / |a_k|: gradients and a_k written out."""
    rng, eta, sizes, steps = np.random.default_rng(1), 0.1, [5, 20, 11], [2, 9, 4]
    w = rng.normal(size=8)
    gradients = [rng.normal(size=(8, tau)) for tau in steps]
    a = [
        np.array([sum(momentum**i for i in range(tau - j)) for j in range(tau)], np.float64) for tau in steps
    ]
    p = np.array(sizes) / sum(sizes)
    tau_eff = sum(p_k * a_k.sum() for p_k, a_k in zip(p, a, strict=True))
    expected = w - tau_eff * eta * sum(
        p_k * g @ a_k / a_k.sum() for p_k, g, a_k in zip(p, gradients, a, strict=True)
    )
    replies = []
    for k, (g, tau) in enumerate(zip(gradients, steps, strict=True)):
        weight = torch.tensor(w, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=eta, momentum=momentum)
        for column in g.T:
            weight.grad = torch.tensor(column)
            optimizer.step()
        replies.append(reply(k, {"w": weight.detach().numpy()}, sizes[k], tau))
    found = step(FedNova(("w",), Train(momentum=momentum)), {"w": w}, replies)["w"]
    assert found == pytest.approx(expected, rel=1e-12)


def test_clients_with_equal_steps_may_come_as_one():
    rng = np.random.default_rng(2)
    w, parts = rng.normal(size=4), [rng.normal(size=4) for _ in range(4)]
    single = [
        reply(i, {"w": v}, n, t)
        for i, (v, n, t) in enumerate(zip(parts, (3, 5, 2, 8), (4, 4, 9, 9), strict=True))
    ]
    grouped = [
        reply(1, {"w": (3 * parts[0] + 5 * parts[1]) / 8}, 8, 4),
        reply(2, {"w": (2 * parts[2] + 8 * parts[3]) / 10}, 10, 9),
    ]
    one, other = (step(FedNova(("w",), PLAIN), {"w": w}, replies)["w"] for replies in (single, grouped))
    assert one == pytest.approx(other, rel=1e-13)


def test_another_optimiser_is_refused():
    with pytest.raises(ValueError, match=r"train\.optimizer = 'adam'"):
        FedNova(("w",), Train(optimizer="adam"))
