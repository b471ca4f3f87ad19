"""What a variant costs a device: bytes on the wire and installed, memory, latency."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from fedge.artefact import pack
from fedge.inference import INPUT, CompactModel
from fedge.spec import Spec
from fedge_server.compression.onnx_graph import copied, load

_WARM_UP = 5  # calls before any is timed
_MIN_CALLS = 5
_BYTES_OF_TEXT = 16  # what a label counts in memory: a string's handle


@dataclass(frozen=True, slots=True)
class Cost:
    """One graph as it ships, and what it takes to hold and run it."""

    installed: bytes  # ONNX
    wire: bytes  # packed
    latency_us: Mapping[int, float]  # median at batch 1 on this machine, by threads
    memory_bytes: int  # installed bytes plus the largest sum of activations alive at once


def measure(installed: bytes, spec: Spec, *, threads: Iterable[int] = (1,)) -> Cost:
    """Everything at once; each number of threads that latency is measured with takes 0.15 s."""
    return Cost(
        installed=installed,
        wire=pack(installed),
        latency_us={n: latency_us(CompactModel(installed, spec, threads=n)) for n in sorted(set(threads))},
        memory_bytes=memory_bytes(installed, spec),
    )


def latency_us(model: CompactModel, *, seconds: float = 0.15) -> float:
    """Median microseconds of `CompactModel.run` on one example of zeros, after a warm-up.

    Calls are timed one by one until `seconds` have passed, five at least; the median is unmoved by the
    few that another process interrupts.
    """
    example = model.spec.zeros(1)
    for _ in range(_WARM_UP):
        model.run(example)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _MIN_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        model.run(example)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e6


def memory_bytes(installed: bytes, spec: Spec) -> int:
    """Installed bytes plus the peak of the activations at batch 1, in the graph as onnxruntime fuses it.

    Fused (level "extended"), because an int8 graph on paper holds float copies that never exist. The
    activations are those alive at once when the nodes run in order: from the node that makes a tensor to
    the last one that reads it. The runtime itself (about 55 MB with Python) and its private buffers are
    left out; they hardly differ between variants.
    """
    model = _fused(installed)
    return len(installed) + peak_bytes(model.graph, _activation_bytes(model, spec))


def peak_bytes(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> int:
    """Largest sum of the sizes of tensors alive at once; tensors without a size (constants) count 0."""
    outputs = {item.name for item in graph.output}
    last = {name: i for i, node in enumerate(graph.node) for name in node.input if name not in outputs}
    alive = {item.name: sizes.get(item.name, 0) for item in graph.input}
    peak = sum(alive.values())
    for i, node in enumerate(graph.node):
        alive.update({name: sizes.get(name, 0) for name in node.output if name})
        peak = max(peak, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last.get(name, len(graph.node)) > i}
    return peak


def _fused(installed: bytes) -> onnx.ModelProto:
    """The graph that onnxruntime makes of these bytes before it runs them."""
    with tempfile.TemporaryDirectory(prefix="fedge-measure-") as folder:
        path = Path(folder) / "fused.onnx"
        options = _options(ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(installed, options, providers=["CPUExecutionProvider"])
        return load(path.read_bytes())


def _activation_bytes(model: onnx.ModelProto, spec: Spec) -> dict[str, int]:
    """Bytes of each activation at batch 1, found by running the graph with all of them as outputs."""
    names = list(dict.fromkeys(name for node in model.graph.node for name in node.output if name))
    exposed = copied(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = _options(ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    session = ort.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    example = spec.zeros(1)
    values = session.run(names, {INPUT: example})
    sizes = {name: _array_bytes(value) for name, value in zip(names, values, strict=True)}
    return {INPUT: example.nbytes, **sizes}


def _array_bytes(value: npt.NDArray[Any]) -> int:
    return value.size * _BYTES_OF_TEXT if value.dtype.kind in "OUS" else value.nbytes


def _options(level: Any) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options
