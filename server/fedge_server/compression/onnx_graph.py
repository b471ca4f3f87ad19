"""Small edits of ONNX graphs, each on a copy: strip what a tool left, name the answer, fix the bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from fedge.errors import CompressionError
from fedge.inference import INPUT, LABEL, PROBABILITIES

OPSET = 18  # the exporter's native one; onnxruntime 1.20, the oldest a device may have, reads up to 21
IR_VERSION = 10

LAYERS = ("Conv", "Gemm", "MatMul")  # the operators that hold a network's weights and compute in eight bits
RECURRENT = ("GRU", "LSTM")  # those that compute in float only
RAW = "raw:"  # begins the name of a node of the pre-processing that would otherwise be taken for a layer

_REARRANGING = ("Slice", "Concat", "Unsqueeze", "Squeeze", "Transpose", "Reshape")
_LABELS, _INDEX = "labels", "index"
_KEPT = {INPUT, LABEL, PROBABILITIES, ""}


def load(data: bytes) -> onnx.ModelProto:
    """Read ONNX bytes.

    Raises:
        CompressionError: they are not an ONNX model.
    """
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:
        raise CompressionError(f"onnx: {len(data)} bytes are no readable model ({error})") from error


def dump(model: onnx.ModelProto) -> bytes:
    """The model's bytes after onnx's own checker has passed it; the same model, the same bytes.

    Raises:
        CompressionError: the checker refuses it.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise CompressionError(f"onnx: the checker refuses the graph ({_line(error)})") from error
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A deep copy."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def with_labels(model: onnx.ModelProto, labels: Sequence[str]) -> onnx.ModelProto:
    """A copy that also answers `label`: the name of the most probable class (of equal ones the first)."""
    result = copied(model)
    graph = result.graph
    names = [name.encode() for name in labels]
    graph.initializer.append(helper.make_tensor(_LABELS, TensorProto.STRING, [len(names)], names))
    graph.node.append(helper.make_node("ArgMax", [PROBABILITIES], [_INDEX], axis=1, keepdims=0))
    graph.node.append(helper.make_node("Gather", [_LABELS, _INDEX], [LABEL], axis=0))
    label = helper.make_tensor_value_info(LABEL, TensorProto.STRING, ["batch"])
    probabilities = helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, ["batch", len(names)])
    del graph.output[:]
    graph.output.extend([label, probabilities])
    return result


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which what rearranges constants is done: recurrent weights come as slices of one another."""
    result = copied(model)
    graph = result.graph
    constants = {tensor.name for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type in _REARRANGING and node.input and set(node.input) <= constants | {""}:
            graph.initializer.extend(_computed(node, graph.initializer))
            constants.update(node.output)
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    used = used_initializers(graph)
    del graph.initializer[:]
    graph.initializer.extend(used)
    return result


def _computed(node: onnx.NodeProto, constants: Sequence[onnx.TensorProto]) -> list[onnx.TensorProto]:
    """What a node gives whose inputs are all constants."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in constants if tensor.name in node.input}
    outputs = ReferenceEvaluator(node).run(None, values)
    return [
        numpy_helper.from_array(np.ascontiguousarray(value), name)
        for value, name in zip(outputs, node.output, strict=True)
    ]


def stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that holds only what is computed: no comments, tool names, inferred shapes or long tensor names.

    Torch's exporter leaves about 15 kB of them, which is more than a small student's weights. Only names
    of nodes that begin with `RAW` stay.
    """
    result = copied(model)
    result.ir_version = IR_VERSION
    for field in ("producer_name", "producer_version", "domain", "doc_string", "metadata_props"):
        result.ClearField(field)
    graph = result.graph
    for field in ("value_info", "quantization_annotation", "doc_string", "metadata_props"):
        graph.ClearField(field)
    graph.name = "fedge"
    for node in graph.node:
        if not node.name.startswith(RAW):
            node.ClearField("name")
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for item in (*graph.initializer, *graph.input, *graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for item in (*graph.input, *graph.output):
        item.type.tensor_type.shape.dim[0].dim_param = "batch"
    if not any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        _rename(graph)
    return result


def _rename(graph: onnx.GraphProto) -> None:
    """Number the tensors in the order in which they are used; the names of inputs and outputs stay."""
    short: dict[str, str] = {}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [_short(name, short) for name in names]
    for tensor in graph.initializer:
        tensor.name = _short(tensor.name, short)


def _short(name: str, short: dict[str, str]) -> str:
    return name if name in _KEPT else short.setdefault(name, f"t{len(short)}")


def used_initializers(graph: onnx.GraphProto) -> list[Any]:
    """The constants that some node reads, in their order."""
    read = {name for node in graph.node for name in node.input}
    return [tensor for tensor in graph.initializer if tensor.name in read]


def parents(nodes: Iterable[onnx.NodeProto]) -> dict[str, onnx.NodeProto]:
    """The node that makes each tensor."""
    return {name: node for node in nodes for name in node.output}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
