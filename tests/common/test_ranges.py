"""Ranges of a graph's tensors, and what of them leaves a device."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fedge.errors import FormatError
from fedge.ranges import Ranges, observe

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def graph(kind: int = TensorProto.FLOAT, name: str = "input") -> bytes:
    """`input` (B, 2) to its double and its negative."""
    nodes = [
        helper.make_node("Add", [name, name], ["double"]),
        helper.make_node("Neg", [name], ["negative"]),
    ]
    outputs = [helper.make_tensor_value_info(each, kind, None) for each in ("double", "negative")]
    made = helper.make_graph(nodes, "g", [helper.make_tensor_value_info(name, kind, ["B", 2])], outputs)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def test_ranges_are_those_of_all_examples_in_the_order_of_the_outputs():
    x = np.zeros((70, 2), np.float32)
    x[3, 0], x[69, 1] = -1.5, 4.0
    found = observe(graph(), x)
    assert (found.lowest.tolist(), found.highest.tolist()) == ([-3.0, -4.0], [8.0, 1.5])


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=5))
def test_coarse_ranges_hold_the_exact_ones_and_are_hardly_wider(pairs):
    low = np.array([min(pair) for pair in pairs], np.float32)
    high = np.array([max(pair) for pair in pairs], np.float32)
    found = Ranges(low, high).coarse()
    assert (found.lowest <= low).all()
    assert (found.highest >= high).all()
    for wide, exact in ((found.lowest, low), (found.highest, high)):
        assert (np.abs(wide - exact) <= np.abs(exact) / 64 + 1e-40).all()
        assert ((np.frexp(wide.astype(np.float64))[0] * 128) % 1 == 0).all()  # eight bits of mantissa


def test_a_coarse_number_worked_by_hand():
    # 0.7 = 0.7 * 2^0: 89.6 of 128 steps, so 90/128 above and 89/128 below.
    found = Ranges(np.array([0.7], np.float32), np.array([0.7], np.float32)).coarse()
    assert (float(found.lowest[0]), float(found.highest[0])) == (89 / 128, 90 / 128)


@pytest.mark.parametrize(
    ("lowest", "highest", "why"),
    [
        ([np.nan], [1], "NaN"),
        ([0], [np.inf], "infinite"),
        ([2], [1], "above"),
        ([0, 0], [1], "2 lowest and 1 highest"),
    ],
)
def test_ranges_that_no_examples_give_are_refused(lowest, highest, why):
    with pytest.raises(ValueError, match=why):
        Ranges(np.array(lowest, np.float32), np.array(highest, np.float32))


def test_what_cannot_be_seen_is_an_error_in_one_line():
    with pytest.raises(FormatError, match="nothing to be seen"):
        observe(graph(), np.zeros((0, 2), np.float32))
    with pytest.raises(FormatError, match="cannot run"):
        observe(b"no graph", np.zeros((1, 2), np.float32))
    with pytest.raises(FormatError, match="of float32"):
        observe(graph(TensorProto.DOUBLE), np.zeros((1, 2), np.float64))
    with pytest.raises(FormatError, match="takes"):
        observe(graph(name="other"), np.zeros((1, 2), np.float32))
    with pytest.raises(FormatError, match="NaN"):
        observe(graph(), np.full((1, 2), np.nan, np.float32))
