"""What clients measured: by hand, and what of it is not taken."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge_server.evaluation.clients import across_clients, collect_evaluations
from fedge_server.rounds.validation import evaluation_fault


@pytest.fixture(autouse=True)
def identity():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


def evaluation(node: int = 1, **metrics) -> Message:
    values = {"num-examples": 4, "loss": 0.5, "accuracy": 0.25, **metrics}
    return Message(
        RecordDict({"metrics": MetricRecord(values)}), reply_to=Message(RecordDict(), node, "evaluate")
    )


def figures(accuracies) -> dict[str, float]:
    return across_clients(accuracies, confidence=0.95, resamples=1000, seed=0)


def test_figures_over_twenty_clients_by_hand():
    found = figures([0.5, 0.7, *[0.9] * 18])
    assert found["clients"] == 20
    assert found["accuracy_min"] == 0.5
    assert found["accuracy_worst_decile"] == pytest.approx(0.6)  # the mean of the worst two
    assert found["accuracy_mean"] == pytest.approx(0.87)
    # (0.37^2 + 0.17^2 + 18 * 0.03^2) / 19
    assert found["accuracy_variance"] == pytest.approx((0.1369 + 0.0289 + 0.0162) / 19)
    assert found["accuracy_low"] < 0.87 < found["accuracy_high"] <= 0.9


def test_one_client_has_no_spread():
    assert set(figures([0.5])) == {"clients", "accuracy_mean", "accuracy_min", "accuracy_worst_decile"}


def test_few_clients_have_a_variance_and_no_interval_and_take_no_time():
    """Student's tail of 2 or 3 units is so far out that no number of resamples would reach it."""
    for n in (2, 3, 4):
        assert "accuracy_variance" in figures([0.5, 0.75, 0.25, 1.0][:n])
        assert "accuracy_low" not in figures([0.5, 0.75, 0.25, 1.0][:n])
    sure = across_clients([0.5, 0.75, 0.25, 1.0, 0.5], confidence=0.999, resamples=1000, seed=0)
    assert 0.25 <= sure["accuracy_low"] < 0.6 < sure["accuracy_high"] <= 1.0


def test_the_order_of_the_clients_does_not_matter():
    rng = np.random.default_rng(0)
    values = rng.random(30)
    assert figures(values) == figures(rng.permutation(values))


def test_of_each_client_that_was_asked_one_evaluation_is_taken():
    came = [evaluation(2), evaluation(1), evaluation(1, accuracy=1.0), evaluation(7)]
    valid = collect_evaluations(came, {1, 2, 3}, held_out=False)
    assert [m.metadata.src_node_id for m in valid] == [1, 2]
    assert valid[0].content["metrics"]["accuracy"] == 0.25


def test_where_clients_keep_examples_back_one_that_does_not_say_so_is_left_out():
    came = [evaluation(1), evaluation(2, **{"held-out": 1})]
    valid = collect_evaluations(came, {1, 2}, held_out=True)
    assert [m.metadata.src_node_id for m in valid] == [2]
    assert "held-out" not in valid[0].content["metrics"]  # no strategy averages it


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"accuracy": 1.5}, "accuracy is 1.5; it must be a number from 0 to 1"),
        ({"accuracy": -0.1}, "accuracy is -0.1"),
        ({"accuracy": float("nan")}, "accuracy is nan"),
        ({"accuracy": 0.3}, "accuracy is 0.3, which no whole number of 4 examples gives"),
        ({"loss": 1e7}, "loss is 10000000.0; it must be a number from 0 to 1e+06"),
        ({"num-examples": 10**10}, "num-examples is 10000000000; it must be a whole number from 1"),
        ({"num-examples": 0}, "num-examples is 0"),
        ({"bonus": 1.0}, "instead of ['accuracy', 'loss', 'num-examples']"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(changes, says):
    assert says in evaluation_fault(evaluation(**changes))


def test_a_client_that_has_nothing_to_evaluate_on_is_left_out():
    failed = Message(Error(2, "DataError: none of 3 examples"), reply_to=evaluation())
    assert collect_evaluations([failed], {1}, held_out=True) == []
