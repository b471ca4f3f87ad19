"""An int8 graph that keeps most of an earlier one's codes, and answers as freshly rounded weights do.

Between two releases every weight moves, most by less than a step of rounding. To keep each code whose weight
is within some tolerance would keep the old model: small moves of one direction add up. So each output's codes
are chosen together: with weights w, scale s, M the second moment of the layer's inputs and b the codes of the
earlier release, those codes c that make

    g (w - s c) M (w - s c)^T  +  price * |{i : c_i != b_i}|

small; g is what a squared error of the layer's outputs does to the answers (`layer_inputs`), so that layers
on which much depends, often small ones, change as they have to, and codes stay where it matters little. It
begins with c = b and goes through the inputs, one after the other, setting each code to what is best while
the others stay, as QuantEase does without the price (Behdin et al. 2023, "QuantEase: Optimization-based
Quantization for Language Models", arXiv:2309.01885). What one code leaves undone, the next ones make good,
so that a few changed codes carry what all the weights have learned; and the bias takes up what is left in
the mean (Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias Correction",
ICCV). Each release is chosen towards its own float weights: errors do not add up over releases.

Scales and ranges stay where the new values fit. Recurrent layers, embeddings, grouped convolutions and
layers of more than `layer_inputs.MAX_INPUTS` inputs keep their fresh codes.

Shapes: O outputs, I inputs of one output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from fedge.inference import Float32
from fedge_server.compression.layer_inputs import Inputs, Layer, constants, layers_of, with_constants
from fedge_server.compression.onnx_graph import LAYERS, copied, dump, load, parents

# Of a changed code, as multiples of what rounding one average weight costs (g s^2 E[x^2] / 12). Each goes on
# from the codes of the one before: coming from above finds fewer and larger changes.
PRICES: Final = tuple(2**n for n in range(12, -1, -1))
LEVELS: Final = 64  # the largest code: weights use 7 of the 8 bits, see `quantise`
_SWEEPS: Final = 3  # through all inputs, at each price
_DAMPING: Final = 0.1  # of the mean square input, added to each: weights count where inputs were never seen
_CLIPPED, _ROOMY = 1.5, 0.6  # an earlier scale stays while the largest weight is so many times its range
_RANGE_PAST, _RANGE_LEAST = 0.01, 0.9  # likewise of activations: a hundredth beyond its ends; how wide
_BLOCK: Final = 128
_MOST: Final = 2**31 - 1  # of a bias

_Constants = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Near:
    """A graph near an earlier one."""

    graph: bytes
    price: int
    changed: float  # share of the weights' codes that are not the earlier ones


def alike(one: bytes, other: bytes) -> bool:
    """Whether two files are of one graph: they differ in the values of constants alone."""
    return _skeleton(load(one)) == _skeleton(load(other))


def near(fresh: bytes, base: bytes, exact: bytes, inputs: Sequence[Inputs | None]) -> Iterator[Near]:
    """Graphs ever farther from an earlier one, as the price of a changed code falls.

    Args:
        fresh: as `quantise` made it.
        base: the earlier release's, of the same graph; else there are none.
        exact: what `fresh` was made of, in float32.
        inputs: of the layers of `exact`.
    """
    model, earlier = load(fresh), load(base)
    if _skeleton(model) != _skeleton(earlier):
        return
    new, old = constants(model.graph), constants(earlier.graph)
    tasks = _tasks(model.graph, load(exact).graph, new, old, inputs)
    if not tasks:
        return
    kept = _ranges(model.graph, new, old)
    total = sum(task.codes.size for task in tasks)
    unit = sum(task.rounding for task in tasks) / total
    for price in PRICES:
        changed = dict(kept)
        for task in tasks:
            task.settle(price * unit)
            changed |= task.weights(new)
        changed |= _biases(model.graph, tasks, new, changed)
        moved = sum(int(np.count_nonzero(task.codes != task.base)) for task in tasks)
        yield Near(dump(with_constants(model, changed)), price, moved / total)


@dataclass(slots=True, eq=False)
class _Task:
    """The codes of one layer, on their way."""

    layer: Layer  # of the int8 graph
    exact: Float32  # (O, I) weights
    scale: Float32  # (O, 1)
    base: Float32  # (O, I) the earlier codes; where the scale is new, those nearest to the earlier values
    inputs: Inputs
    codes: Float32 = field(init=False)
    _moment: Float32 = field(init=False)  # (I, I)
    _typical: float = field(init=False)
    _worth: Float32 = field(init=False)  # (O,) nats of a squared error of one step

    def __post_init__(self) -> None:
        second = self.inputs.second
        if len(self.layer.node.input) > 2:  # the bias takes up what is off in the mean
            second = second - np.outer(self.inputs.mean, self.inputs.mean)
        self._typical = float(np.diag(second).mean())
        self._moment = second + np.float32(_DAMPING * self._typical) * np.eye(len(second), dtype=np.float32)
        self._worth = np.broadcast_to(self.inputs.sensitivity * self.scale[:, 0] ** 2, len(self.exact))
        self.codes = self.base.copy()

    @property
    def rounding(self) -> float:
        """Nats that rounding all weights costs, about; onnxruntime's scale of weights that are all 0 is 1."""
        lives = np.abs(self.exact).max(axis=1) > 0
        weights: int = self.exact.shape[1]  # of an output
        return weights * float(self._worth[lives].sum()) * self._typical / 12

    def settle(self, price: float) -> None:
        """Go on from the present codes until they suit the price of a changed one, in nats."""
        if self.rounding <= 0:
            return
        lam = (price / np.maximum(self._worth, np.finfo(np.float32).tiny)).astype(np.float32)
        left = self.exact / self.scale - self.codes  # (O, I), in steps
        for _ in range(_SWEEPS):
            for start in range(0, left.shape[1], _BLOCK):
                chosen = slice(start, min(start + _BLOCK, left.shape[1]))
                self._settle_block(chosen, left, lam)

    def _settle_block(self, chosen: slice, left: Float32, lam: Float32) -> None:
        pull = left @ self._moment[:, chosen]  # (O, block): half of how fast the error falls with each code
        within = self._moment[chosen, chosen]
        for j, i in enumerate(range(chosen.start, chosen.stop)):
            now, was, weight, gain = self.codes[:, i], self.base[:, i], within[j, j], pull[:, j]
            best = np.clip(np.rint(now + gain / weight), -LEVELS, LEVELS)
            by, back = best - now, was - now
            cost = by * (weight * by - 2 * gain) + np.where(best != was, lam, np.float32(0))
            free = back * (weight * back - 2 * gain)
            moved = np.where(cost < free, by, back)
            rows = np.flatnonzero(moved)
            if len(rows):
                self.codes[rows, i] += moved[rows]
                left[rows, i] -= moved[rows]
                pull[rows] -= np.outer(moved[rows], within[j])

    def weights(self, new: _Constants) -> _Constants:
        """Codes and scales as the graph stores them."""
        assert self.layer.widen is not None  # noqa: S101 - `_task` has seen to it
        codes, scale = self.layer.widen.input[:2]
        stored = self.layer.back(self.codes.astype(np.int8), new[codes].shape)
        return {codes: stored, scale: self.scale.reshape(new[scale].shape)}

    def missing(self) -> Float32:
        """What the outputs (O,) lack in the mean."""
        lacking: Float32 = (self.exact - self.scale * self.codes) @ self.inputs.mean
        return lacking


def _skeleton(model: onnx.ModelProto) -> bytes:
    bare = copied(model)
    for tensor in bare.graph.initializer:
        for name in ("raw_data", "float_data", "int32_data", "int64_data", "string_data", "double_data"):
            tensor.ClearField(name)
    data: bytes = bare.SerializeToString(deterministic=True)
    return data


def _tasks(
    graph: onnx.GraphProto,
    plain: onnx.GraphProto,
    new: _Constants,
    old: _Constants,
    inputs: Sequence[Inputs | None],
) -> list[_Task]:
    floats, found, others = constants(plain), layers_of(graph), layers_of(plain)
    if not len(found) == len(others) == len(inputs):
        return []
    every = (
        _task(layer, other.rows(floats[other.weight]), new, old, seen)
        for layer, other, seen in zip(found, others, inputs, strict=True)
        if layer is not None and layer.widen is not None and other is not None and seen is not None
        if len(layer.node.input) < 3 or _widens(graph, layer.node) is not None
    )
    return [each for each in every if each is not None]


def _task(layer: Layer, exact: Float32, new: _Constants, old: _Constants, inputs: Inputs) -> _Task | None:
    """None where the layers of both graphs do not stand in the same order, or codes are of another kind."""
    assert layer.widen is not None  # noqa: S101 - `_tasks` has looked
    name, scale_name = layer.widen.input[:2]
    codes, scale = layer.rows(new[name]), new[scale_name].reshape(-1, 1)
    if codes.dtype != np.int8 or codes.shape != exact.shape or len(scale) not in (1, len(codes)):
        return None
    if np.abs(codes * scale - exact).max() > scale.max():
        return None
    before, was = layer.rows(old[name]).astype(np.float32), old[scale_name].reshape(-1, 1)
    top = np.abs(exact).max(axis=1 if len(scale) > 1 else None, keepdims=True)
    fits = ((top <= _CLIPPED * LEVELS * was) & (top >= _ROOMY * LEVELS * was)) | (top == 0)
    kept = np.where(fits, was, scale)
    base = np.clip(np.rint(before * (was / kept)), -LEVELS, LEVELS)
    return _Task(layer, np.ascontiguousarray(exact), kept, base, inputs)


def _ranges(graph: onnx.GraphProto, new: _Constants, old: _Constants) -> _Constants:
    """Earlier scales and zero points of activations that still fit."""
    kept: _Constants = {}
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or len(node.input) < 3 or new[node.input[2]].dtype != np.uint8:
            continue
        scale, zero = node.input[1:3]
        (low, high), (least, most) = _ends(new[scale], new[zero]), _ends(old[scale], old[zero])
        width = most - least
        covers = low >= least - _RANGE_PAST * width and high <= most + _RANGE_PAST * width
        if covers and high - low >= _RANGE_LEAST * width:
            kept |= {scale: old[scale], zero: old[zero]}
    return kept


def _ends(scale: npt.NDArray[Any], zero: npt.NDArray[Any]) -> tuple[float, float]:
    step, at = float(scale), int(zero)
    return -step * at, step * (255 - at)


def _biases(
    graph: onnx.GraphProto, tasks: Sequence[_Task], new: _Constants, changed: _Constants
) -> _Constants:
    """Biases under the scales that integer kernels take for granted: that of inputs times that of weights."""
    found: _Constants = {}
    lacking = {task.layer.node.output[0]: task.missing() for task in tasks}
    for node in graph.node:
        if node.op_type not in LAYERS or (widens := _widens(graph, node)) is None:
            continue
        incoming, weight, bias = widens
        codes, scale = bias.input[:2]
        steps = [changed.get(name, new[name]) for name in (incoming.input[1], weight.input[1])]
        step = (steps[0] * steps[1]).astype(np.float32).reshape(new[scale].shape)
        values = new[codes] * new[scale].astype(np.float64) + lacking.get(node.output[0], 0.0)
        found |= {scale: step, codes: np.clip(np.rint(values / step), -_MOST, _MOST).astype(np.int32)}
    return found


def _widens(
    graph: onnx.GraphProto, node: onnx.NodeProto
) -> tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto] | None:
    """What widens a layer's inputs, weights and bias; None: it has no bias, or computes in float."""
    makers = parents(graph.node)
    found = [makers.get(name) for name in node.input]
    widens = [each for each in found if each is not None and each.op_type == "DequantizeLinear"]
    return (widens[0], widens[1], widens[2]) if len(widens) == 3 else None
