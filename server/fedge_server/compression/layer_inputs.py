"""What goes into each layer of a graph, and what an error of its outputs does to the answers.

A layer that answers W x is off by (W - V) x with other weights V. Over all examples the mean square of that
is the trace of (W - V) M (W - V)^T, M = E[x x^T], so M is all that has to be known of the data (LeCun, Denker
and Solla 1990, "Optimal Brain Damage"; Frantar and Alistarh 2022, "Optimal Brain Compression", for layers).
What such an error does to the graph's answers differs by orders of magnitude from layer to layer, so it is
tried out, with noise on the weights of one layer at a time.

Shapes: N examples, O outputs, I inputs of one output (of a convolution: channels times kernel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from fedge.errors import CompressionError
from fedge.inference import INPUT, PROBABILITIES, Float32
from fedge_server.compression.onnx_graph import LAYERS, RAW, copied, load, parents

MAX_INPUTS: Final = 4096  # of an output: M takes 64 MB; a larger layer is not looked at
MAX_EXAMPLES: Final = 8192
_POSITIONS: Final = 16  # of a convolution, drawn in each batch: neighbours say nearly the same
_BATCH: Final = 128
_PROBED: Final = 256  # examples on which a layer's noise is tried
_NOISE: Final = 1 / 32  # standard deviation, of each output's largest weight: two steps of seven bits
_LEAST: Final = 1e-7  # a probability: float32 knows no finer ones near 1


@dataclass(frozen=True, slots=True)
class Layer:
    """A node of `LAYERS` with constant weights that are its own."""

    node: onnx.NodeProto
    weight: str  # name of the initializer; in QDQ form of the codes
    widen: onnx.NodeProto | None  # the DequantizeLinear in front of it; None: weights are float

    @property
    def is_transposed(self) -> bool:
        """Whether the weights lie as (I, O)."""
        attributes = _attributes(self.node)
        return self.node.op_type == "MatMul" or (self.node.op_type == "Gemm" and not attributes.get("transB"))

    def rows(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Weights, or what has their shape, as (O, I)."""
        return values.T if self.is_transposed else values.reshape(len(values), -1)

    def back(self, rows: npt.NDArray[Any], shape: Sequence[int]) -> npt.NDArray[Any]:
        """The reverse of `rows`."""
        return np.ascontiguousarray(rows.T if self.is_transposed else rows.reshape(shape))


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Of one layer."""

    second: Float32  # (I, I) mean of x x^T
    mean: Float32  # (I,)
    sensitivity: float  # nats by which answers diverge for each unit of squared error, summed over outputs


def layers_of(graph: onnx.GraphProto) -> list[Layer | None]:
    """The layers in their order; None for one that is of no such kind: grouped, tied, too wide."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    makers = parents(graph.node)
    nodes = [node for node in graph.node if node.op_type in LAYERS and not node.name.startswith(RAW)]
    found = []
    for node in nodes:
        widen = makers.get(node.input[1])
        if widen is not None and widen.op_type != "DequantizeLinear":
            widen = None
        layer = Layer(node, node.input[1] if widen is None else widen.input[0], widen)
        readers = sum(node.input[1] in other.input for other in graph.node)
        usual = readers == 1 and _is_usual(layer, sizes.get(layer.weight, ()))
        found.append(layer if usual else None)
    return found


def inputs_of(graph: bytes, x: npt.NDArray[Any]) -> tuple[Inputs | None, ...]:
    """What goes into each of the graph's `layers_of`; None where that says None.

    Args:
        graph: float32, as `export` returned it.
        x: raw inputs (N, *spec.shape), of which the first `MAX_EXAMPLES` are looked at.

    Raises:
        CompressionError: onnxruntime cannot run the graph.
    """
    model, probed = load(graph), x[:_PROBED]
    every = layers_of(model.graph)
    layers = [layer for layer in every if layer is not None]
    if not layers:
        return tuple(None for _ in every)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    sums: dict[str, tuple[Float32, Float32, int]] = {}
    x = x[:MAX_EXAMPLES]
    names = list(dict.fromkeys(layer.node.input[0] for layer in layers))
    session = _session(model, names)
    for start in range(0, len(x), _BATCH):
        values = _run(session, names, x[start : start + _BATCH])
        for layer in layers:
            rows = _rows(layer.node, values[layer.node.input[0]], shapes[layer.weight], seed=start)
            second, total, count = sums.get(layer.weight, (np.float32(0), np.float32(0), 0))
            sums[layer.weight] = (second + rows.T @ rows, total + rows.sum(axis=0), count + len(rows))
    exact, found = _answers(model, probed), dict[str, Inputs]()
    for layer in layers if sums else ():
        moment, total, count = sums[layer.weight]
        second, mean = moment / np.float32(count), total / np.float32(count)
        found[layer.weight] = Inputs(second, mean, _sensitivity(model, layer, second, exact, probed))
    return tuple(None if each is None else found.get(each.weight) for each in every)


def divergence(exact: Float32, answers: Float32) -> float:
    """Mean Kullback-Leibler divergence in nats, 0 or more, of answers from the exact ones, both (N, C)."""
    p, q = (np.clip(each.astype(np.float64), _LEAST, 1.0) for each in (exact, answers))
    return max(float((p * np.log(p / q)).sum(axis=1).mean()), 0.0)


def _sensitivity(
    model: onnx.ModelProto, layer: Layer, second: Float32, exact: Float32, x: npt.NDArray[Any]
) -> float:
    values = constants(model.graph)[layer.weight]
    rows = layer.rows(values)
    noise = np.random.default_rng(0).normal(0, _NOISE, rows.shape).astype(np.float32)
    noise *= np.abs(rows).max(axis=1, keepdims=True)
    error = float((noise @ second * noise).sum())
    if error <= 0:
        return 0.0
    noisy = with_constants(model, {layer.weight: layer.back(rows + noise, values.shape)})
    return divergence(exact, _answers(noisy, x)) / error


def _is_usual(layer: Layer, shape: tuple[int, ...]) -> bool:
    attributes = _attributes(layer.node)
    if layer.node.op_type == "Conv":
        inputs = prod(shape[1:])
        plain = attributes.get("group", 1) == 1 and attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
        return len(shape) > 2 and plain and inputs <= MAX_INPUTS
    plain = all(attributes.get(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    plain = plain and not attributes.get("transA")
    return len(shape) == 2 and plain and shape[0 if layer.is_transposed else 1] <= MAX_INPUTS


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def _session(model: onnx.ModelProto, names: Sequence[str]) -> ort.InferenceSession:
    """That answers these values of the graph."""
    exposed = copied(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the same sums on every machine
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CompressionError(f"near: onnxruntime cannot open the graph ({error})") from error


def _run(session: ort.InferenceSession, names: Sequence[str], x: npt.NDArray[Any]) -> dict[str, Float32]:
    try:
        return dict(zip(names, session.run(names, {INPUT: x}), strict=True))
    except Exception as error:
        raise CompressionError(f"near: onnxruntime cannot run the graph ({error})") from error


def _answers(model: onnx.ModelProto, x: npt.NDArray[Any]) -> Float32:
    """Probabilities (N, C)."""
    return _run(_session(model, [PROBABILITIES]), [PROBABILITIES], x)[PROBABILITIES]


def _rows(node: onnx.NodeProto, x: Float32, shape: tuple[int, ...], *, seed: int) -> Float32:
    """The inputs of single outputs (rows, I)."""
    if node.op_type != "Conv":
        return x.reshape(-1, x.shape[-1])
    kernel, attributes = shape[2:], _attributes(node)
    axes = len(kernel)
    pads = attributes.get("pads", [0] * 2 * axes)
    wide = [(0, 0), (0, 0), *((pads[i], pads[axes + i]) for i in range(axes))]
    strides, steps = attributes.get("strides", [1] * axes), attributes.get("dilations", [1] * axes)
    window = [(k - 1) * step + 1 for k, step in zip(kernel, steps, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(np.pad(x, wide), window, axis=tuple(range(2, 2 + axes)))
    chosen = (slice(None), slice(None), *(slice(None, None, n) for n in (*strides, *steps)))
    views = np.moveaxis(views[chosen], 1, 1 + axes)  # (B, *positions, C, *kernel)
    positions = np.array(list(np.ndindex(views.shape[1 : 1 + axes])))
    order = np.random.default_rng(seed).permutation(len(positions))[:_POSITIONS]
    picked = [views[(slice(None), *place)].reshape(len(x), -1) for place in positions[np.sort(order)]]
    return np.concatenate(picked)


def constants(graph: onnx.GraphProto) -> dict[str, npt.NDArray[Any]]:
    """The values of all initializers."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def with_constants(model: onnx.ModelProto, values: Mapping[str, npt.NDArray[Any]]) -> onnx.ModelProto:
    """A copy of the model with other values of some initializers."""
    result = copied(model)
    for tensor in result.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return result
