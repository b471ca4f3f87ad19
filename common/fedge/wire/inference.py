"""Examples and answers as they travel in the Inference service: raw bytes, held to what they declare."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.errors import FormatError
from fedge.spec import Spec
from fedge.wire.v1 import inference_pb2 as pb

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

MAX_DIMENSIONS: Final = 4  # of a batch: one more than an example may have
MAX_ANSWER_BYTES: Final = 4 * 1024**2
_SUM_TOLERANCE: Final = 1e-3  # of probabilities, which are float32 and may be many
_DTYPES: Final = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64"),
)
_KNOWN: Final = {name: np.dtype(name).newbyteorder("<") for name in _DTYPES}


def write_examples(x: Array) -> pb.InferExamples:
    """A batch (B, *shape) as it travels."""
    data = np.ascontiguousarray(x, x.dtype.newbyteorder("<")).tobytes()
    return pb.InferExamples(dtype=x.dtype.name, shape=x.shape, data=data)


def read_examples(sent: pb.InferExamples) -> Array:
    """The array that has come; it lies in the bytes that came, so nothing is allocated for what is declared.

    Raises:
        FormatError: an unknown dtype, nothing, too many dimensions, or other bytes than are declared.
    """
    dtype, shape = _KNOWN.get(sent.dtype), tuple(sent.shape)
    if dtype is None:
        raise FormatError(
            f"input: dtype {sent.dtype[:40]!r} is unknown; it must be one of {', '.join(_KNOWN)}"
        )
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise FormatError(f"input: {len(shape)} dimensions; an example or a batch has 1 to {MAX_DIMENSIONS}")
    if 0 in shape:
        raise FormatError(f"input: shape {shape} holds nothing")
    declared = math.prod(shape) * dtype.itemsize  # exact: numpy's product would wrap around
    if declared != len(sent.data):
        raise FormatError(
            f"input: {sent.dtype} of shape {shape} takes {declared} bytes, and {len(sent.data)} have come"
        )
    flat = np.frombuffer(sent.data, dtype)
    if sent.dtype == "bool" and flat.size and flat.view(np.uint8).max() > 1:
        raise FormatError("input: bool, but holds other bytes than 0 and 1")
    return flat.astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def write_answers(probabilities: Float32, spec: Spec) -> list[pb.InferAnswer]:
    """Rows of probabilities (B, classes) as answers."""
    best = probabilities.argmax(1)
    return [
        pb.InferAnswer(label=spec.labels[i], confidence=float(row[i]), probabilities=row.tolist())
        for i, row in zip(best.tolist(), probabilities, strict=True)
    ]


def read_answers(reply: pb.InferReply, count: int, spec: Spec) -> Float32:
    """The probabilities (count, classes) of a reply, which may say anything.

    Raises:
        FormatError: it has another number of answers, or one that is no distribution over the labels.
    """
    if len(reply.answers) != count:
        raise FormatError(f"answer: {len(reply.answers)} for {count} examples")
    rows = [answer.probabilities for answer in reply.answers]
    if any(len(row) != spec.classes for row in rows):
        raise FormatError(f"answer: not {spec.classes} probabilities, one for each label")
    found = np.array(rows, np.float32).reshape(count, spec.classes)
    # NaN fails every comparison, so the question is whether all is right.
    if not ((found >= 0).all() and (np.abs(found.sum(1, dtype=np.float64) - 1) <= _SUM_TOLERANCE).all()):
        raise FormatError("answer: probabilities that are negative, not finite, or do not add up to 1")
    best = found.argmax(1).tolist()
    if any(answer.label != spec.labels[i] for answer, i in zip(reply.answers, best, strict=True)):
        raise FormatError("answer: labels that are not those of the model's, in its order")
    return found
