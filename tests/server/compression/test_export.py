from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedge.artefact import pack
from fedge.errors import CompressionError
from fedge.inference import CompactModel
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge_server.compression import export as export_module
from fedge_server.compression.export import export
from fedge_server.compression.measure import latency_us, measure, peak_bytes


@pytest.mark.slow
def test_the_exported_graph_answers_as_torch_does_for_any_batch(exported, teacher, digits):
    model = CompactModel(exported, digits.spec)
    for batch in (1, 2, 7):
        raw = digits.gate.x[:batch]
        labels, probabilities = model.run(raw)
        with torch.no_grad():
            wanted = torch.softmax(teacher(torch.from_numpy(raw)), dim=1).numpy()
        np.testing.assert_allclose(probabilities, wanted, atol=1e-5)
        assert labels == [digits.spec.labels[i] for i in wanted.argmax(1)]


def test_the_names_of_the_classes_are_inside_the_graph(exported):
    graph = onnx.load_model_from_string(exported).graph
    strings = [list(t.string_data) for t in graph.initializer if t.data_type == onnx.TensorProto.STRING]
    assert strings == [
        [b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine"]
    ]
    assert [item.name for item in graph.output] == ["label", "probabilities"]


def test_the_graph_passes_onnx_checker_and_holds_nothing_that_is_not_computed(exported):
    model = onnx.load_model_from_string(exported)
    onnx.checker.check_model(model, full_check=True)
    assert (model.producer_name, model.doc_string, len(model.metadata_props)) == ("", "", 0)
    assert len(model.graph.value_info) == 0
    for node in model.graph.node:
        assert (node.name, node.doc_string, len(node.metadata_props)) == ("", "", 0)
    weights = 4 * (64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10)
    assert len(exported) - weights < 1200


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes_and_is_not_changed(exported, teacher, digits, helpers):
    before = helpers.weights(teacher)
    teacher.train()
    assert export(teacher, digits.spec) == exported
    assert teacher.training
    assert helpers.same(before, helpers.weights(teacher))


@pytest.mark.slow
def test_a_batch_normalised_convolution_on_colour_images_is_exported(helpers):
    class Input(nn.Module):
        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            return raw.float().permute(0, 3, 1, 2) / 255

    spec = Spec("image", (8, 8, 3), "uint8", ("cat", "dog"))
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)
    )
    data = export(WholeModel(Input(), network), spec)
    labels, probabilities = CompactModel(data, spec).run(spec.zeros(3))
    assert probabilities.shape == (3, 2)
    assert set(labels) <= {"cat", "dog"}


@pytest.mark.slow
def test_missing_values_of_a_table_pass_through_the_exported_preprocessing():
    class Fill(nn.Module):
        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            return torch.where(torch.isnan(raw), torch.zeros_like(raw), raw)

    spec = Spec("features", (5,), "float32", ("no", "yes"))
    model = CompactModel(export(WholeModel(Fill(), nn.Linear(5, 2)), spec), spec)
    row = np.array([[1, np.nan, 0, 2, np.nan]], np.float32)
    np.testing.assert_array_equal(model.run(row)[1], model.run(np.nan_to_num(row))[1])


@pytest.mark.slow
def test_a_graph_that_differs_from_torch_is_never_returned(teacher, digits, monkeypatch):
    honest = export_module.with_labels

    def wrong(model, labels):
        result = honest(model, labels)
        weight = next(t for t in result.graph.initializer if list(t.dims) == [10, 64])
        weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((10, 64), np.float32), weight.name))
        return result

    monkeypatch.setattr(export_module, "with_labels", wrong)
    with pytest.raises(CompressionError, match="differs from torch"):
        export(teacher, digits.spec)


@pytest.mark.slow
def test_a_model_that_torch_cannot_export_is_one_clear_line(digits, helpers, capfd):
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :10] if x.sum() > 0 else x[:, 10:20]

    with pytest.raises(CompressionError, match="cannot export") as caught:
        export(WholeModel(helpers.Scale(), Branch()), digits.spec)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_network_that_does_not_answer_one_value_per_class_is_refused(digits, helpers):
    with pytest.raises(CompressionError, match=r"answers \(2, 3\), not \(2, 10\)"):
        export(WholeModel(helpers.Scale(), nn.Linear(64, 3)), digits.spec)


@pytest.mark.slow
def test_exporting_prints_nothing(teacher, digits, capfd):
    export(teacher, digits.spec)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_memory_is_the_file_and_the_largest_activations_alive_at_once(exported, digits):
    cost = measure(exported, digits.spec)
    # Fused, the widest moment is one dense layer's input and output: 64 + 64 floats of 4 bytes, or the
    # raw image as float beside its bytes; shape arithmetic adds a few bytes at most.
    assert len(exported) + 512 <= cost.memory_bytes <= len(exported) + 1024
    assert cost.wire == pack(exported)
    assert list(cost.latency_us) == [1]
    assert cost.latency_us[1] > 1


def test_the_peak_counts_a_tensor_until_its_last_reader():
    node = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("A", ["input"], ["a"]),
            node("B", ["a"], ["b"]),
            node("C", ["a", "b"], ["c"]),
            node("D", ["c"], ["d"]),
        ],
        "g",
        [onnx.helper.make_tensor_value_info("input", 1, [1])],
        [onnx.helper.make_tensor_value_info("d", 1, [1])],
    )
    # input 10 + a 20 = 30; a 20 + b 5 = 25; a 20 + b 5 + c 7 = 32; c 7 + d 1 = 8.
    assert peak_bytes(graph, {"input": 10, "a": 20, "b": 5, "c": 7, "d": 1}) == 32


def test_timing_ends_in_time(exported, digits):
    assert latency_us(CompactModel(exported, digits.spec), seconds=0.0) > 0
