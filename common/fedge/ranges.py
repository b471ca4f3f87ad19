"""Between which values the tensors of a graph lie: all that calibration needs to know of anybody's data.

Numpy and onnxruntime alone, the latter once something is observed: a server asks this of its own data, a
device of what it holds, by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.errors import FormatError

Float32 = npt.NDArray[np.float32]

MAX_TENSORS: Final = 256  # that a graph may ask about: so many numbers a device tells at most, twice
_CHUNK: Final = 32  # examples that are run together
_STEPS: Final = 128.0  # of a coarse number's mantissa: 0.5 .. 1 in 64 of them


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """The least and the largest value of each tensor, over some examples.

    Raises:
        ValueError: they are not as many of one as of the other, not finite, or the wrong way round.
    """

    lowest: Float32  # (T,)
    highest: Float32  # (T,)

    def __post_init__(self) -> None:
        """Refuse what no examples give."""
        for name, values in (("lowest", self.lowest), ("highest", self.highest)):
            if values.dtype != np.float32 or values.ndim != 1:
                raise ValueError(f"{name} is {values.dtype} {values.shape}, not float32 in one dimension")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} holds NaN or infinite values")
        if self.lowest.shape != self.highest.shape:
            raise ValueError(f"{len(self.lowest)} lowest and {len(self.highest)} highest values")
        if not (self.lowest <= self.highest).all():
            raise ValueError("a lowest value is above the highest")

    def coarse(self) -> Ranges:
        """Widened to numbers of eight bits, by under 2 %: no extreme value leaves a device as it is.

        Who sees an extreme sees something of the one example that it comes from; eight bits of it say less.
        """
        return Ranges(_outward(self.lowest, np.floor), _outward(self.highest, np.ceil))


def observe(graph: bytes, x: npt.NDArray[Any]) -> Ranges:
    """The ranges of all outputs of a graph, in their order.

    Args:
        graph: ONNX from `input` (B, ...) to the float32 tensors that are asked about.
        x: (N, ...) raw examples, N at least 1.

    Raises:
        FormatError: the graph cannot be opened or run, has other outputs or too many, or gives no numbers.
    """
    import onnxruntime as ort

    from fedge.inference import INPUT

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # As it is written: fused, a tensor in the middle would be another one than the device's.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        kinds = {output.type for output in session.get_outputs()}
        inputs = [item.name for item in session.get_inputs()]
        if inputs != [INPUT] or not 1 <= len(names) <= MAX_TENSORS or kinds != {"tensor(float)"}:
            raise FormatError(
                f"ranges: the graph takes {inputs} and gives {len(names)} outputs of {sorted(kinds)}; it "
                f"must take {INPUT!r} and give 1 to {MAX_TENSORS} of float32"
            )
        parts = [session.run(names, {INPUT: x[i : i + _CHUNK]}) for i in range(0, len(x), _CHUNK)]
    except FormatError:
        raise
    except Exception as error:  # onnxruntime raises bare RuntimeErrors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise FormatError(f"ranges: onnxruntime cannot run the graph ({reason})") from error
    if not parts or any(value.size == 0 for part in parts for value in part):
        raise FormatError(f"ranges: there is nothing to be seen in {len(x)} examples of {x.shape[1:]}")
    lowest = np.array([[value.min() for value in part] for part in parts], np.float32).min(0)
    highest = np.array([[value.max() for value in part] for part in parts], np.float32).max(0)
    try:
        return Ranges(lowest, highest)
    except ValueError as error:
        raise FormatError(f"ranges: {error}") from error


def _outward(values: Float32, towards: Any) -> Float32:
    mantissa, exponent = np.frexp(values.astype(np.float64))
    limit = float(np.finfo(np.float32).max)
    coarse = np.ldexp(towards(mantissa * _STEPS) / _STEPS, exponent)
    found: Float32 = np.clip(coarse, -limit, limit).astype(np.float32)
    return found
