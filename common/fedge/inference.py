"""Run a compact model with onnxruntime and numpy: the one way to get an answer, on gate and device alike.

The gate scores exactly what a device computes because both come through here: same session options,
one example at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fedge.errors import FormatError
from fedge.spec import Spec

INPUT, LABEL, PROBABILITIES = "input", "label", "probabilities"  # names in the ONNX graph

Float32 = npt.NDArray[np.float32]


class CompactModel:
    """An ONNX graph with pre-processing and labels inside, open for inference.

    The graph takes `input` (B, *spec.shape) raw, and gives `label` (B,) strings and `probabilities`
    (B, classes) float32.
    """

    def __init__(self, onnx: bytes, spec: Spec, *, threads: int = 1) -> None:
        """Open the graph on the CPU and hold it to the spec.

        Raises:
            FormatError: no readable ONNX graph, or its inputs and outputs are not those of the spec.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors reach us as exceptions
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a device has other work
        try:
            self._session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises bare RuntimeErrors of many kinds
            raise FormatError(f"model: onnxruntime cannot load it ({_first_line(error)})") from error
        self.spec = spec
        self._shape, self._dtype, self._classes = spec.shape, np.dtype(spec.dtype), spec.classes
        self._check_signature()

    def _check_signature(self) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        wanted = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}[self.spec.dtype]
        names = [item.name for item in (*inputs, *outputs)]
        if names != [INPUT, LABEL, PROBABILITIES]:
            raise FormatError(f"model: has inputs and outputs {names}, not {[INPUT, LABEL, PROBABILITIES]}")
        if inputs[0].type != wanted or tuple(inputs[0].shape[1:]) != self.spec.shape:
            raise FormatError(
                f"model: takes {inputs[0].type} {inputs[0].shape}, but its spec says "
                f"{self.spec.dtype} (B, *{self.spec.shape})"
            )
        if [item.type for item in outputs] != ["tensor(string)", "tensor(float)"]:
            raise FormatError(
                f"model: gives {outputs[0].type} and {outputs[1].type}, not text labels and float32 numbers"
            )

    def run(self, x: npt.NDArray[Any]) -> tuple[list[str], Float32]:
        """Labels (length B) and probabilities (B, classes) of a batch x (B, *spec.shape).

        Raises:
            FormatError: x has another shape or dtype than the spec, the graph fails on it, or its answer
                is not one label and `classes` probabilities for each example.
        """
        if x.shape[1:] != self._shape or x.dtype != self._dtype:  # a shape has a dimension or more
            raise FormatError(
                f"input: {x.dtype} {x.shape} does not fit; "
                f"this model takes {self.spec.dtype} (B, *{self.spec.shape})"
            )
        try:
            labels, probabilities = self._session.run([LABEL, PROBABILITIES], {INPUT: x})
        except Exception as error:  # onnxruntime raises bare RuntimeErrors of many kinds
            raise FormatError(f"model: cannot be run ({_first_line(error)})") from error
        if len(labels) != len(x) or probabilities.shape != (len(x), self._classes):
            raise FormatError(
                f"model: {len(x)} examples give {len(labels)} labels and probabilities "
                f"{probabilities.shape}, not {(len(x), self.spec.classes)}"
            )
        return [str(label) for label in labels], probabilities

    def run_each(self, x: npt.NDArray[Any]) -> Float32:
        """Probabilities (N, classes), computed one example at a time as a device does."""
        rows: Sequence[Float32] = [self.run(x[i : i + 1])[1] for i in range(len(x))]
        return np.concatenate(rows) if rows else np.zeros((0, self.spec.classes), np.float32)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
