from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedge.learning.metrics import evaluate

EVERY: Any = ("accuracy", "macro_f1", "auc", "recall")


def test_four_examples_of_three_classes_by_hand() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1], [0.2, 0.2, 0.6]])
    found = evaluate(p, np.array([0, 1, 0, 2]), EVERY)
    # Answers 0, 1, 1, 2. Class 0: precision 1, recall 1/2, F1 2/3. Class 1: 1/2, 1, 2/3. Class 2: 1.
    assert found["accuracy"] == 0.75
    assert found["recall"] == [0.5, 1.0, 1.0]
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found["loss"] == pytest.approx(-np.log([0.7, 0.8, 0.3, 0.6]).mean())
    assert "auc" not in found  # three classes


def test_auc_is_the_share_of_pairs_in_order_and_a_tie_counts_half() -> None:
    scores = np.array([0.9, 0.6, 0.6, 0.2])
    p = np.stack([1 - scores, scores], axis=1)
    # Positives .9 and .6, negatives .6 and .2: three pairs in order, one tie.
    assert evaluate(p, np.array([1, 1, 0, 0]), EVERY)["auc"] == pytest.approx(3.5 / 4)
    assert evaluate(p, np.array([0, 0, 1, 1]), EVERY)["auc"] == pytest.approx(0.5 / 4)
    assert evaluate(np.full((4, 2), 0.5), np.array([1, 1, 0, 0]), EVERY)["auc"] == 0.5


@pytest.mark.parametrize("label", [0, 1])
def test_auc_is_left_out_when_one_class_does_not_occur(label: int) -> None:
    found = evaluate(np.array([[0.9, 0.1], [0.2, 0.8]]), np.full(2, label), EVERY)
    assert "auc" not in found
    assert found["recall"] == ([0.5, 0.0] if label == 0 else [0.0, 0.5])


def test_a_class_that_does_not_occur_counts_as_zero_in_recall_and_f1() -> None:
    found = evaluate(np.array([[1.0, 0, 0], [0, 1.0, 0]]), np.array([0, 1]), EVERY)
    assert found["recall"] == [1.0, 1.0, 0.0]
    assert found["macro_f1"] == pytest.approx(2 / 3)


def test_only_loss_and_accuracy_are_always_there() -> None:
    assert sorted(evaluate(np.array([[0.9, 0.1]]), np.array([0]), ())) == ["accuracy", "loss"]


def test_a_certain_wrong_answer_costs_a_finite_loss() -> None:
    found = evaluate(np.array([[1.0, 0.0]]), np.array([1]), ())
    assert found["loss"] == pytest.approx(-np.log(1e-12))


def test_single_precision_is_enough() -> None:
    p = np.array([[0.9, 0.1], [0.4, 0.6]], np.float32)
    assert evaluate(p, np.array([0, 1]), EVERY)["loss"] == pytest.approx(-np.log([0.9, 0.6]).mean(), rel=1e-6)
