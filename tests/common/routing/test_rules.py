from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge.errors import FormatError
from fedge.routing import CLOUD_ONLY, DEVICE_ONLY, DOUBTS, Rule, chosen

ROWS = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], np.float32)


def test_each_measure_gives_the_number_that_is_worked_by_hand() -> None:
    h = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)
    assert DOUBTS["confidence"](ROWS) == pytest.approx([0.3, 0, 2 / 3], abs=1e-6)
    assert DOUBTS["margin"](ROWS) == pytest.approx([0.5, 0, 1], abs=1e-6)
    assert DOUBTS["entropy"](ROWS) == pytest.approx([h, 0, 1], abs=1e-6)


def test_one_side_alone_is_a_rule_too() -> None:
    for rule, sent in ((DEVICE_ONLY, []), (CLOUD_ONLY, [0, 1, 2]), (Rule("margin", 0.4), [0, 2])):
        assert chosen(rule.doubts(ROWS), rule.threshold, 9).tolist() == sent


def test_of_too_many_the_most_doubtful_are_sent_in_their_order() -> None:
    doubts = np.array([0.9, 0.1, 0.7, 0.8, 0.7])
    assert chosen(doubts, 0.5, 3).tolist() == [0, 2, 3]  # of two alike the first
    assert chosen(doubts, 0.5, 0).tolist() == []


@pytest.mark.parametrize("values", [{"doubt": "luck"}, {"threshold": 1.1}, {"threshold": math.nan}])
def test_a_rule_that_is_none_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="rule"):
        Rule(**values)  # type: ignore[arg-type]


def distributions() -> st.SearchStrategy[np.ndarray]:
    shape = st.tuples(st.integers(1, 8), st.integers(2, 12))
    raw = shape.flatmap(lambda s: hnp.arrays(np.float64, s, elements=st.floats(0, 50)))
    return raw.map(lambda x: (np.exp(x) / np.exp(x).sum(1, keepdims=True)).astype(np.float32))


@given(distributions(), st.floats(-1, 1), st.integers(0, 10))
def test_doubts_lie_between_0_and_1_and_what_is_sent_is_doubted_more_than_what_is_not(
    rows: np.ndarray, threshold: float, most: int
) -> None:
    for name in DOUBTS:
        doubts = Rule(name, threshold).doubts(rows)
        assert doubts.shape == (len(rows),)
        assert ((doubts >= 0) & (doubts <= 1)).all()
        sent = chosen(doubts, threshold, most)
        above = np.flatnonzero(doubts > threshold)
        assert set(sent) <= set(above)
        assert len(sent) == min(most, len(above))
        rest = np.setdiff1d(above, sent)
        assert not len(rest) or not len(sent) or doubts[sent].min() >= doubts[rest].max()


@given(distributions())
def test_the_order_of_classes_does_not_matter(rows: np.ndarray) -> None:
    for name in DOUBTS:
        assert Rule(name).doubts(rows) == pytest.approx(Rule(name).doubts(rows[:, ::-1]), abs=1e-9)
