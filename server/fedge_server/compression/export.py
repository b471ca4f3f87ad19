"""A model becomes one ONNX file: raw input in, label and probabilities out; held to torch's own answer."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from fedge.errors import CompressionError, FormatError
from fedge.inference import INPUT, PROBABILITIES, CompactModel
from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge_server.compression.onnx_graph import (
    LAYERS,
    OPSET,
    RAW,
    copied,
    dump,
    folded,
    stripped,
    with_labels,
)

TOLERANCE = 1e-4  # largest difference of a probability between onnxruntime and torch, on random input

_SCOPES = "pkg.torch.onnx.name_scopes"  # the modules that a node comes from, as the exporter records them
_MISSING = 0.05  # share of random values that are NaN in the check, where an input may have missing ones


def export(model: WholeModel, spec: Spec) -> bytes:
    """The model as ONNX: `input` (B, *spec.shape) to `label` (B,) and `probabilities` (B, classes) float32.

    Pre-processing, softmax and the names of the classes are inside, the batch is dynamic, and everything
    the exporter leaves that is not computed is gone. The model itself is not touched.

    Raises:
        CompressionError: it does not answer one value per class, torch cannot export it, or onnxruntime
            differs from torch by more than `TOLERANCE`; nothing that was not compared is ever returned.
    """
    probabilities = _Probabilities(copy.deepcopy(model)).eval()
    example = torch.from_numpy(spec.zeros(2))
    with torch.inference_mode():
        answer = tuple(probabilities(example).shape)
    if answer != (2, spec.classes):
        raise CompressionError(f"export: to two examples the model answers {answer}, not {(2, spec.classes)}")
    graph = _exported(probabilities, example)
    data = dump(stripped(with_labels(folded(_marked(graph)), spec.labels)))
    difference = largest_difference(probabilities, data, spec)
    if not difference <= TOLERANCE:
        raise CompressionError(
            f"export: onnxruntime differs from torch by {difference:.2g} (allowed: {TOLERANCE:g}); "
            "the model uses an operation that the exporter does not translate faithfully"
        )
    return data


def largest_difference(probabilities: nn.Module, data: bytes, spec: Spec) -> float:
    """Largest absolute difference between torch's and onnxruntime's probabilities, one example and three.

    A result that is not finite on one side only counts as infinite.

    Raises:
        CompressionError: onnxruntime cannot open or run the graph.
    """
    worst = 0.0
    for batch in (1, 3):
        raw = random_input(spec, batch, seed=batch)
        with torch.inference_mode():
            wanted = probabilities(torch.from_numpy(raw)).numpy()
        try:
            _, given = CompactModel(data, spec).run(raw)
        except (FormatError, RuntimeError) as error:
            raise CompressionError(f"export: the exported graph does not run ({error})") from error
        if wanted.shape != given.shape or not np.array_equal(np.isfinite(wanted), np.isfinite(given)):
            return float("inf")
        worst = max(worst, float(np.nanmax(np.abs(wanted - given), initial=0.0)))
    return worst


def random_input(spec: Spec, batch: int, *, seed: int) -> npt.NDArray[Any]:
    """Raw inputs (B, *spec.shape) drawn at random: whole range for uint8, normal for float32."""
    rng = np.random.default_rng(seed)
    size = (batch, *spec.shape)
    if spec.dtype == "uint8":
        return rng.integers(0, spec.classes if spec.kind == "text" else 256, size, dtype=np.uint8)
    values = rng.standard_normal(size, dtype=np.float32)
    if spec.allows_missing:
        values[rng.random(size) < _MISSING] = np.nan
    return values


class _Probabilities(nn.Module):
    """Raw input to probabilities."""

    def __init__(self, model: WholeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.model(raw), dim=-1)


def _exported(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                input_names=[INPUT],
                output_names=[PROBABILITIES],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        reason = next(
            (line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__
        )
        raise CompressionError(f"export: torch cannot export the model ({reason.strip()[:200]})") from error
    if program is None:
        raise CompressionError("export: torch exported nothing")
    return program.model_proto


def _marked(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which the pre-processing's nodes have names that begin with `RAW`.

    A smoothing filter is a convolution too, and must not be taken for a layer when layers are quantised.
    """
    result = copied(model)
    for i, node in enumerate(result.graph.node):
        scopes = "".join(item.value for item in node.metadata_props if item.key == _SCOPES)
        if node.op_type in LAYERS and "'model.preprocess'" in scopes:
            node.name = f"{RAW}{i}"
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter off the console: absent torchvision and its own deprecations are not the user's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # the result is compared with torch, whatever it warns of
            yield
    finally:
        logger.setLevel(level)
