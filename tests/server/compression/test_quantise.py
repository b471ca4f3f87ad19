from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedge.artefact import pack
from fedge.errors import CompressionError
from fedge.inference import CompactModel
from fedge.learning.whole import WholeModel
from fedge.ranges import Ranges, observe
from fedge_server.compression.export import export
from fedge_server.compression.quantise import quantise, quantise_dynamically, quantise_within, watched


@pytest.fixture(scope="module")
def quantised(exported, digits):
    return quantise(exported, digits.proxy.x[:64])


@pytest.mark.slow
def test_eight_bits_agree_with_the_original_and_take_a_third_of_the_bytes(exported, quantised, digits):
    before = CompactModel(exported, digits.spec).run(digits.gate.x)[1]
    after = CompactModel(quantised, digits.spec).run(digits.gate.x)[1]
    assert (before.argmax(1) == after.argmax(1)).mean() > 0.985
    assert np.abs(before - after).mean() < 0.005
    assert len(pack(quantised)) < len(pack(exported)) / 3


def test_weights_are_int8_within_seven_bits_per_channel(quantised):
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in _graph(quantised).initializer}
    matrices = [value for value in tensors.values() if value.dtype == np.int8 and value.ndim == 2]
    assert len(matrices) == 3
    assert all(np.abs(value.astype(int)).max() <= 64 for value in matrices)
    widths = {value.shape for value in tensors.values() if value.dtype == np.float32 and value.ndim == 1}
    assert {(64,), (10,)} <= widths  # a scale for each output channel


def test_preprocessing_and_softmax_stay_float_and_logits_are_not_rounded(quantised):
    makers = {name: node for node in _graph(quantised).node for name in node.output}
    softmax = next(node for node in makers.values() if node.op_type == "Softmax")
    assert makers[softmax.input[0]].op_type == "Gemm"
    first = next(node for node in _graph(quantised).node if node.op_type == "QuantizeLinear")
    assert makers[first.input[0]].op_type == "Reshape"  # the end of the pre-processing


@pytest.mark.slow
def test_a_convolution_of_the_preprocessing_is_not_quantised(digits):
    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.full((1, 1, 3, 3), 1 / 9))

        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            return torch.conv2d(raw.float().unsqueeze(1) / 16, self.kernel)

    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    data = quantise(export(WholeModel(Smooth(), network), digits.spec), digits.proxy.x[:32])
    makers = {name: node for node in _graph(data).node for name in node.output}
    sources = [makers[n.input[0]].op_type for n in _graph(data).node if n.op_type == "Conv"]
    assert sorted(sources) == ["DequantizeLinear", "Div"]


def test_the_same_input_gives_the_same_bytes_without_metadata(exported, quantised, digits):
    assert quantise(exported, digits.proxy.x[:64]) == quantised
    model = onnx.load_model_from_string(quantised)
    onnx.checker.check_model(model, full_check=True)
    assert (model.producer_name, len(model.metadata_props), len(model.graph.value_info)) == ("", 0, 0)
    assert not any(node.name or node.doc_string for node in model.graph.node)


def test_no_file_is_left_and_nothing_is_printed(exported, digits, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    quantise(exported, digits.proxy.x[:32])
    assert list(Path(tmp_path).iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_no_calibration_data_is_refused(exported, digits):
    with pytest.raises(CompressionError, match="no calibration data"):
        quantise(exported, digits.proxy.x[:0])


@pytest.mark.slow
def test_a_network_without_layers_is_refused(digits, helpers):
    class Ten(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :10]

    data = export(WholeModel(helpers.Scale(), Ten()), digits.spec)
    with pytest.raises(CompressionError, match="none of Conv"):
        quantise(data, digits.proxy.x[:8])


@pytest.mark.slow
def test_without_any_data_products_are_in_int8_by_the_range_of_each_input(exported, digits):
    dynamic = quantise_dynamically(exported)
    kinds = [node.op_type for node in _graph(dynamic).node]
    assert kinds.count("MatMulInteger") == kinds.count("DynamicQuantizeLinear") == 3
    before = CompactModel(exported, digits.spec).run_each(digits.gate.x)
    after = CompactModel(dynamic, digits.spec).run_each(digits.gate.x)
    assert (before.argmax(1) == after.argmax(1)).mean() > 0.985
    assert len(pack(dynamic)) < len(pack(exported)) / 3
    assert quantise_dynamically(exported) == dynamic


@pytest.mark.slow
def test_without_data_convolutions_keep_their_weights_in_int8_and_those_of_the_preprocessing_do_not(digits):
    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.full((1, 1, 3, 3), 1 / 9))

        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            return torch.conv2d(raw.float().unsqueeze(1) / 16, self.kernel)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    model = export(WholeModel(Smooth(), network), digits.spec)
    dynamic = quantise_dynamically(model)
    makers = {name: node for node in _graph(dynamic).node for name in node.output}
    weights = [makers.get(node.input[1]) for node in _graph(dynamic).node if node.op_type == "Conv"]
    assert [node and node.op_type for node in weights] == [None, "DequantizeLinear"]
    raw = digits.gate.x[:50]
    before, after = (CompactModel(data, digits.spec).run_each(raw) for data in (model, dynamic))
    assert np.abs(before - after).max() < 0.02


def test_bytes_that_are_no_model_are_refused(digits):
    with pytest.raises(CompressionError, match="no readable model"):
        quantise(b"nonsense", digits.proxy.x[:8])


def _graph(data: bytes) -> onnx.GraphProto:
    return onnx.load_model_from_string(data).graph


def test_ranges_that_others_have_seen_give_the_bytes_that_their_examples_give(exported, quantised, digits):
    parts = [observe(watched(exported), digits.proxy.x[i:64:4]) for i in range(4)]
    lowest = np.min([part.lowest for part in parts], axis=0)
    highest = np.max([part.highest for part in parts], axis=0)
    assert quantise_within(exported, Ranges(lowest, highest)) == quantised


def test_ranges_of_another_graph_are_refused(exported):
    one = np.zeros(1, np.float32)
    with pytest.raises(CompressionError, match="1 ranges for the"):
        quantise_within(exported, Ranges(one, one))


def test_it_is_what_onnxruntimes_own_function_gives(exported, quantised, digits, tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    from fedge_server.compression import quantise as module

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.parts = iter([digits.proxy.x[:32], digits.proxy.x[32:64]])

        def get_next(self):
            part = next(self.parts, None)
            return None if part is None else {"input": part}

    model = module._named(onnx.load_model_from_string(exported))
    quantize_static(
        model, tmp_path / "q.onnx", Reader(), op_types_to_quantize=["Conv", "Gemm", "MatMul", "Relu", "Clip"],
        nodes_to_quantize=module._chosen(model.graph), per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    theirs = module._with_float_logits(onnx.load(tmp_path / "q.onnx"))
    assert module.dump(module.stripped(theirs)) == quantised
