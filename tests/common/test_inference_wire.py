"""Examples and answers as they travel: there and back, and whatever else may come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge.errors import FormatError
from fedge.spec import Spec
from fedge.wire.inference import read_answers, read_examples, write_answers, write_examples
from fedge.wire.v1 import inference_pb2 as pb

SPEC = Spec("features", (2,), "float32", ("a", "b", "c"))
DTYPES = ["bool", "uint8", "int16", "uint32", "int64", "float16", "float32", "float64"]


@given(
    st.sampled_from(DTYPES).flatmap(
        lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
    )
)
def test_examples_arrive_as_they_were(x: np.ndarray) -> None:
    back = read_examples(pb.InferExamples.FromString(write_examples(x).SerializeToString()))
    assert (back.dtype, back.shape) == (x.dtype, x.shape)
    assert back.tobytes() == x.tobytes()


def test_columns_that_run_fastest_and_another_byte_order_arrive_in_order() -> None:
    x = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert (read_examples(write_examples(x)) == x).all()


@given(
    st.text(max_size=8) | st.sampled_from(DTYPES),
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 4), max_size=6),
    st.binary(max_size=64),
)
def test_whatever_comes_is_an_array_of_its_bytes_or_refused(
    dtype: str, shape: list[int], data: bytes
) -> None:
    try:
        found = read_examples(pb.InferExamples(dtype=dtype, shape=shape, data=data))
    except FormatError:
        return
    assert found.nbytes == len(data) <= 64


def rows_of(*rows: list[float]) -> pb.InferReply:
    return pb.InferReply(answers=write_answers(np.array(rows, np.float32), SPEC))


def test_answers_arrive_as_they_were() -> None:
    rows = np.array([[0.2, 0.7, 0.1], [1, 0, 0]], np.float32)
    reply = pb.InferReply(answers=write_answers(rows, SPEC))
    assert [(a.label, round(a.confidence, 4)) for a in reply.answers] == [("b", 0.7), ("a", 1.0)]
    assert (read_answers(reply, 2, SPEC) == rows).all()


def relabelled(reply: pb.InferReply) -> pb.InferReply:
    reply.answers[0].label = "zebra"
    return reply


@pytest.mark.parametrize(
    "reply",
    [
        pb.InferReply(),
        rows_of([1, 0, 0], [1, 0, 0]),
        rows_of([0.5, 0.4, 0.0]),
        rows_of([-0.5, 1.5, 0.0]),
        rows_of([float("nan"), 1, 0]),
        rows_of([float("inf"), 0, 0]),
        pb.InferReply(answers=[pb.InferAnswer(label="a", probabilities=[1.0])]),
        relabelled(rows_of([1, 0, 0])),
    ],
)
def test_answers_that_are_none_are_refused(reply: pb.InferReply) -> None:
    with pytest.raises(FormatError, match="answer"):
        read_answers(reply, 1, SPEC)


def test_no_answer_to_no_question() -> None:
    assert read_answers(pb.InferReply(), 0, SPEC).shape == (0, 3)
