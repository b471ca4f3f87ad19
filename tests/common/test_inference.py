from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedge.errors import FormatError
from fedge.inference import CompactModel


def test_a_model_answers_with_label_and_probabilities_worked_by_hand(tools: Any) -> None:
    labels, probabilities = CompactModel(tools.constant_model(1), tools.images).run(tools.images.zeros(2))
    certain, rest = math.exp(4) / (math.exp(4) + 2), 1 / (math.exp(4) + 2)
    assert labels == ["one", "one"]
    np.testing.assert_allclose(probabilities, [[rest, certain, rest]] * 2, rtol=1e-6)


def test_raw_pixels_reach_the_graph(tools: Any) -> None:
    weights = np.zeros((64, 3))
    weights[5, 2] = 0.1
    model = CompactModel(tools.linear_model(tools.images, weights, np.array([1.0, 0, 0])), tools.images)
    x = tools.images.zeros(2)
    x[1, 0, 5] = 255  # 25.5 for the third class, against 1 for the first
    assert model.run(x)[0] == ["zero", "two"]


def test_one_by_one_gives_what_a_batch_gives(tools: Any) -> None:
    rng = np.random.default_rng(0)
    model = CompactModel(
        tools.linear_model(tools.images, rng.normal(size=(64, 3)) / 1000, np.zeros(3)), tools.images
    )
    x = rng.integers(0, 255, (5, 8, 8), dtype=np.uint8)
    np.testing.assert_allclose(model.run_each(x), model.run(x)[1], atol=1e-6)
    assert model.run_each(x[:0]).shape == (0, 3)


@pytest.mark.parametrize("onnx", [b"", b"no graph", b"\x08\x0a"])
def test_what_is_no_graph_is_refused_in_one_line(tools: Any, onnx: bytes) -> None:
    with pytest.raises(FormatError, match="cannot load") as caught:
        CompactModel(onnx, tools.images)
    assert "\n" not in str(caught.value)


def test_a_model_must_be_that_of_its_spec(tools: Any) -> None:
    model = tools.constant_model(0)
    with pytest.raises(FormatError, match="its spec says"):
        CompactModel(model, replace(tools.images, shape=(4, 16)))
    with pytest.raises(FormatError, match="its spec says"):
        CompactModel(model, replace(tools.images, dtype="float32"))
    with pytest.raises(FormatError, match=r"probabilities \(1, 3\), not \(1, 2\)"):
        CompactModel(model, replace(tools.images, labels=("a", "b"))).run(tools.images.zeros(1))


def renamed(model: bytes, change: Any) -> bytes:
    import onnx

    graph = onnx.load_from_string(model)
    change(graph)
    return bytes(graph.SerializeToString())


def test_a_graph_with_other_outputs_is_refused(tools: Any) -> None:
    def no_label(model: Any) -> None:
        del model.graph.output[0]

    def exchanged(model: Any) -> None:
        model.graph.output.reverse()

    for change in (no_label, exchanged):
        with pytest.raises(FormatError, match="inputs and outputs"):
            CompactModel(renamed(tools.constant_model(0), change), tools.images)


def test_a_graph_that_fails_on_an_input_is_our_error(tools: Any) -> None:
    def other_reshape(model: Any) -> None:
        from onnx import numpy_helper

        for constant in model.graph.initializer:
            if constant.name == "flat":
                constant.CopyFrom(numpy_helper.from_array(np.array([7, 64], np.int64), "flat"))

    model = CompactModel(renamed(tools.constant_model(0), other_reshape), tools.images)
    with pytest.raises(FormatError, match="cannot be run"):
        model.run(tools.images.zeros(1))


@pytest.mark.parametrize(
    "x", [np.zeros((1, 8, 8), np.float32), np.zeros((8, 8), np.uint8), np.zeros((), np.uint8)]
)
def test_an_input_of_another_shape_or_type_is_refused(tools: Any, x: Any) -> None:
    with pytest.raises(FormatError, match="does not fit"):
        CompactModel(tools.constant_model(0), tools.images).run(x)
