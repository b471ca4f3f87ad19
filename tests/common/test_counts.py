"""Counts of what teacher and variant got right, of one holder and of many."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.counts import Counts, rightly


def whole(*values):
    return np.array(values, np.int64)


def test_counts_worked_by_hand():
    # class:    0  0  0  1  1
    # teacher:  +  +  -  +  -
    # variant:  +  -  +  -  -
    y = whole(0, 0, 0, 1, 1)
    teacher, variant = np.array([1, 1, 0, 1, 0], bool), np.array([1, 0, 1, 0, 0], bool)
    found = Counts.of(variant, teacher, y, 3)
    assert found.n.tolist() == [3, 2, 0]
    assert (found.both.tolist(), found.losses.tolist(), found.wins.tolist()) == (
        [1, 0, 0],
        [1, 1, 0],
        [1, 0, 0],
    )
    assert (found.examples, found.accuracy, found.teacher_accuracy) == (5, 2 / 5, 3 / 5)


def test_counts_of_many_holders_are_those_of_all_their_examples_together():
    rng = np.random.default_rng(0)
    y, right, teacher = rng.integers(0, 4, 90), rng.random(90) < 0.7, rng.random(90) < 0.8
    parts = [Counts.of(right[i::3], teacher[i::3], y[i::3], 4) for i in range(3)]
    total, together = Counts.sum(parts, 4), Counts.of(right, teacher, y, 4)
    for name in ("n", "both", "losses", "wins"):
        assert getattr(total, name).tolist() == getattr(together, name).tolist()
    assert Counts.sum([], 4).examples == 0


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ((whole(1), whole(2), whole(0), whole(0)), "more than there are"),
        ((whole(1), whole(-1), whole(0), whole(0)), "fewer than no"),
        ((whole(1), whole(1), whole(1), whole(0)), "twice"),
        ((whole(1), whole(1, 1), whole(0), whole(0)), "not int64"),
        ((whole(1), np.array([1.0]), whole(0), whole(0)), "float64"),
    ],
)
def test_what_nobody_can_count_is_refused(counts, why):
    with pytest.raises(ValueError, match=why):
        Counts(*counts)


def test_an_answer_with_a_nan_is_not_right():
    answers = np.array([[0.1, 0.9], [np.nan, 1.0], [0.8, 0.2]], np.float32)
    assert rightly(answers, whole(1, 1, 1)).tolist() == [True, False, False]
