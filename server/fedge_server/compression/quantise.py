"""Weights and activations in eight bits: static, per channel, calibrated on a few (Jacob et al. 2018).

"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018;
QDQ form by onnxruntime. Weights use 7 of the 8 bits, so that no processor can saturate: those without VNNI
add two products in 16 bits, and the gate's evidence must hold on them too. Recurrent layers and embeddings
keep their weights in 8 bits and compute in float: onnxruntime has no integer form of them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

from fedge.errors import CompressionError, FormatError
from fedge.ranges import MAX_TENSORS, Ranges, observe
from fedge_server.compression.onnx_graph import (
    LAYERS,
    RAW,
    RECURRENT,
    copied,
    dump,
    load,
    parents,
    stripped,
    used_initializers,
)

MAX_CALIBRATION = 256  # examples that are used at most; 32 suffice where they are in the domain
_FOLDED = ("Relu", "Clip")  # where one follows such an operator it becomes the lower end of its range
_SMALL = 256  # constants of fewer values gain nothing
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")  # the exporter has folded what there is to fold


def quantise(onnx_bytes: bytes, calibration: npt.NDArray[Any]) -> bytes:
    """The same graph with `LAYERS` in int8; pre-processing, logits and softmax stay float.

    Of recurrent layers and embeddings the weights alone are in int8, per unit or row.

    Args:
        onnx_bytes: what `export` returned.
        calibration: raw inputs (N, *spec.shape) in the training distribution; the first
            `MAX_CALIBRATION` set the ranges of the activations.

    Raises:
        CompressionError: there is no calibration data, nothing to quantise, or onnxruntime fails.
    """
    if len(calibration) == 0:
        raise CompressionError("quantise: no calibration data; keep some (evaluate.proxy_fraction)")
    seen = calibration[:MAX_CALIBRATION]
    try:
        return quantise_within(onnx_bytes, observe(watched(onnx_bytes), seen))
    except FormatError as error:
        raise CompressionError(f"quantise: {error}") from error


def quantise_within(onnx_bytes: bytes, ranges: Ranges) -> bytes:
    """The same from the ranges of the activations, whoever has looked at them.

    Args:
        onnx_bytes: what `export` returned.
        ranges: of the outputs of `watched`, in their order.

    Raises:
        CompressionError: there is nothing to quantise, the ranges are of another graph, or onnxruntime fails.
    """
    model = _inferred(onnx_bytes)
    names = _watched(model.graph)
    if len(names) != len(ranges.lowest):
        raise CompressionError(
            f"quantise: {len(ranges.lowest)} ranges for the {len(names)} activations of the graph"
        )
    limits = zip(names, ranges.lowest, ranges.highest, strict=True)
    quantised = _quantised(model, {name: (low, high) for name, low, high in limits})
    return dump(stripped(_with_small_weights(_with_float_logits(quantised))))


def quantise_dynamically(onnx_bytes: bytes) -> bytes:
    """The graph with integer products whose inputs are rounded by their own range, at every call.

    It needs no data at all. Matrix products compute in int8; convolutions, recurrent layers and embeddings
    keep their weights alone in int8, since onnxruntime has no integer form of them that takes such ranges. A
    range is that of a whole batch: to be judged, examples must be run one by one, as devices do.

    Args:
        onnx_bytes: what `export` returned.

    Raises:
        CompressionError: nothing in it can be quantised, or onnxruntime fails.
    """
    model = _inferred(onnx_bytes)
    names = _chosen(model.graph)
    names += [f"{name}_MatMul" for name in names]  # what onnxruntime makes of a Gemm first
    with tempfile.TemporaryDirectory(prefix="fedge-quantise-") as folder:
        path = Path(folder) / "quantised.onnx"
        try:
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                nodes_to_quantize=names,
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise CompressionError(f"quantise: onnxruntime cannot quantise the graph ({reason})") from error
        quantised = load(path.read_bytes())
    return dump(stripped(_with_small_weights(quantised, ("Conv",))))


def watched(onnx_bytes: bytes) -> bytes:
    """The graph whose outputs are the activations that will be quantised, for `fedge.ranges.observe`.

    Raises:
        CompressionError: there is nothing to quantise, or more than can be asked about.
    """
    model = _inferred(onnx_bytes)
    names = _watched(model.graph)
    if len(names) > MAX_TENSORS:
        raise CompressionError(f"quantise: {len(names)} activations; at most {MAX_TENSORS} are calibrated")
    result = copied(model)
    graph = result.graph
    del graph.output[:]
    graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    _drop_unused(graph)
    for field in ("value_info", "metadata_props"):
        graph.ClearField(field)
    data: bytes = result.SerializeToString(deterministic=True)
    return data


def _inferred(onnx_bytes: bytes) -> onnx.ModelProto:
    """The model with named nodes and the types of all tensors.

    Raises:
        CompressionError: the network has nothing to quantise.
    """
    model = _named(load(onnx_bytes))
    if not _chosen(model.graph):
        raise CompressionError(f"quantise: the network has none of {', '.join(LAYERS)}")
    try:
        return save_and_reload_model_with_shape_infer(model)
    except Exception as error:
        raise CompressionError(f"quantise: the graph's types cannot be told ({error})") from error


def _watched(graph: onnx.GraphProto) -> list[str]:
    """Names of the float tensors that go into and come out of what is quantised, in their order."""
    known = (*graph.value_info, *graph.output, *graph.input)
    floats = {item.name for item in known if item.type.tensor_type.elem_type == TensorProto.FLOAT}
    constants = {tensor.name for tensor in graph.initializer}
    chosen = frozenset(_chosen(graph))
    names = (name for node in graph.node if node.name in chosen for name in (*node.input, *node.output))
    return [name for name in dict.fromkeys(names) if name in floats and name not in constants]


def _quantised(model: onnx.ModelProto, limits: dict[str, tuple[np.float32, np.float32]]) -> onnx.ModelProto:
    """The model in the QDQ form; as onnxruntime's `quantize_static` calls it, without its calibration."""
    found = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in limits.items()
    }
    try:
        quantizer = QDQQuantizer(
            copied(model),
            True,  # per channel
            True,  # reduced range
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, found),
            _chosen(model.graph),
            [],
            [*LAYERS, *_FOLDED],
            {},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return quantizer.model.model
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CompressionError(f"quantise: onnxruntime cannot quantise the graph ({reason})") from error


def _chosen(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes to quantise: the network's `LAYERS`, and an activation that follows one."""
    layers = [node for node in graph.node if node.op_type in LAYERS and not node.name.startswith(RAW)]
    outputs = {layer.output[0] for layer in layers}
    folded = [node for node in graph.node if node.op_type in _FOLDED and node.input[0] in outputs]
    return [node.name for node in (*layers, *folded)]


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every node has a name of its own, as the quantiser needs, marked as prepared."""
    result = copied(model)
    for i, node in enumerate(result.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    mark = result.metadata_props.add()
    mark.key, mark.value = _PREPARED
    return result


def _with_float_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose softmax reads the last sums before they are rounded to 256 steps.

    Rounded logits tie, and a tie goes to the first class.
    """
    result = copied(model)
    graph = result.graph
    makers = parents(graph.node)
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        widen = makers.get(softmax.input[0])
        narrow = (
            makers.get(widen.input[0]) if widen is not None and widen.op_type == "DequantizeLinear" else None
        )
        if narrow is not None and narrow.op_type == "QuantizeLinear":
            softmax.input[0] = narrow.input[0]
    _drop_unused(graph)
    return result


def _with_small_weights(model: onnx.ModelProto, besides: tuple[str, ...] = ()) -> onnx.ModelProto:
    """A copy whose recurrent weights and embeddings are int8 that a node before the layer widens again.

    `besides`: operators, not of the pre-processing, whose second input is treated so too.
    """
    result = copied(model)
    graph = result.graph
    axes = {name: 1 for node in graph.node if node.op_type in RECURRENT for name in node.input[1:3]}
    axes |= {node.input[0]: 0 for node in graph.node if node.op_type == "Gather"}
    layers = (node for node in graph.node if node.op_type in besides and not node.name.startswith(RAW))
    axes |= {node.input[1]: 0 for node in layers}
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.name not in axes or values.dtype != np.float32 or values.size < _SMALL:
            continue
        graph.initializer.remove(tensor)
        widened, constants = _in_eight_bits(tensor.name, values, axes[tensor.name])
        graph.initializer.extend(constants)
        graph.node.insert(0, widened)
    return result


def _in_eight_bits(
    name: str, values: npt.NDArray[np.float32], axis: int
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """The node that gives these values again, rounded to 255 steps along the axis, and its constants."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    scale = np.abs(values).max(axis=others, keepdims=True) / np.float32(127)
    scale = np.where(scale > 0, scale, np.float32(1))
    small = np.rint(values / scale).astype(np.int8)
    stored = {
        f"{name}_int8": small,
        f"{name}_scale": scale.reshape(-1),
        f"{name}_zero": np.zeros(scale.size, np.int8),
    }
    node = onnx.helper.make_node("DequantizeLinear", list(stored), [name], axis=axis)
    return node, [numpy_helper.from_array(array, key) for key, array in stored.items()]


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes, then constants, that nothing reads."""
    needed = {item.name for item in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = used_initializers(graph)
    del graph.initializer[:]
    graph.initializer.extend(constants)
