"""Weights and activations in eight bits: static, per channel, calibrated on a few (Jacob et al. 2018).

"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018;
QDQ form by onnxruntime. Weights use 7 of the 8 bits, so that no processor can saturate: those without VNNI
add two products in 16 bits, and the gate's evidence must hold on them too. Recurrent layers and embeddings
keep their weights in 8 bits and compute in float: onnxruntime has no integer form of them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from fedge.errors import CompressionError
from fedge.inference import INPUT
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
_CHUNK = 32
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
    model = _named(load(onnx_bytes))
    if not _chosen(model.graph):
        raise CompressionError(f"quantise: the network has none of {', '.join(LAYERS)}")
    quantised = _quantised(model, calibration[:MAX_CALIBRATION])
    return dump(stripped(_with_small_weights(_with_float_logits(quantised))))


def _quantised(model: onnx.ModelProto, calibration: npt.NDArray[Any]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="fedge-quantise-") as folder:
        path = Path(folder) / "quantised.onnx"
        try:
            quantize_static(
                model,
                path,
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=[*LAYERS, *_FOLDED],
                nodes_to_quantize=_chosen(model.graph),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return load(path.read_bytes())
        except CompressionError:
            raise
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


def _with_small_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose recurrent weights and embeddings are int8 that a node before the layer widens again."""
    result = copied(model)
    graph = result.graph
    axes = {name: 1 for node in graph.node if node.op_type in RECURRENT for name in node.input[1:3]}
    axes |= {node.input[0]: 0 for node in graph.node if node.op_type == "Gather"}
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


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Hands the calibration data to onnxruntime, some at a time."""

    def __init__(self, data: npt.NDArray[Any]) -> None:
        self._chunks: Iterator[npt.NDArray[Any]] = iter(np.split(data, range(_CHUNK, len(data), _CHUNK)))

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        chunk = next(self._chunks, None)
        return None if chunk is None else {INPUT: chunk}
