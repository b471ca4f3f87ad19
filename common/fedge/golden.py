"""Golden inputs: synthetic ones, made from a spec, and what a variant answered to them where it was gated.

A device holds a new variant to them before it commits it. No example of anybody is among them, and none
travels: the file carries a seed, from which both sides make the same inputs (noise over the range of the
input, smooth ramps, zeros; of a text random characters), the digest of these, and the probabilities in steps
of 1/65535.

    FGLD | schema 1 (u8) | inputs N (u8) | classes C (u32) | seed (u64)
    | latency budget in seconds (f64; 0: none) | SHA-256 of the inputs' bytes (32)
    | probabilities (N, C) u16                                    all little-endian

One golden has one spelling, so its digest in signed metadata names it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from fedge.errors import FormatError
from fedge.files import sha256
from fedge.spec import Spec

MAX_BYTES: Final = 256 * 1024
MAX_INPUTS: Final = 16
MAX_SEED: Final = 2**64 - 1
_MAX_ELEMENTS: Final = 2**22  # of all inputs together: large ones are fewer
_HEADER: Final = struct.Struct("<4sBBIQd32s")
_MAGIC, _SCHEMA = b"FGLD", 1
_STEPS: Final = 65535  # from probability 0 to 1


@dataclass(frozen=True, slots=True)
class Golden:
    """Inputs, and what the model answered to them where it was made."""

    x: npt.NDArray[Any]  # (N, *spec.shape), raw
    probabilities: npt.NDArray[np.float32]  # (N, classes)
    latency_s: float = math.inf  # budget of the tier for one answer, seconds: the median of N keeps it

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if self.probabilities.ndim != 2 or len(self.x) != len(self.probabilities) or not len(self.x):
            raise FormatError(
                f"golden: {len(self.x)} inputs and probabilities {self.probabilities.shape}; "
                "give one row for each input, and one input or more"
            )
        if not np.isfinite(self.probabilities).all() or not self.latency_s > 0:
            raise FormatError("golden: probabilities must be finite, and the latency budget above 0 seconds")

    @classmethod
    def from_bytes(cls, data: bytes, spec: Spec) -> Self:
        """Undo `write`; what is allocated follows from the spec and the file's own length.

        Raises:
            FormatError: another schema or length, for another spec, or made with other inputs.
        """
        if len(data) > MAX_BYTES or len(data) < _HEADER.size:
            raise FormatError(f"golden: {len(data)} bytes; it must have {_HEADER.size} to {MAX_BYTES}")
        magic, schema, count, classes, seed, budget, digest = _HEADER.unpack_from(data)
        if magic != _MAGIC or schema != _SCHEMA:
            raise FormatError(f"golden: begins with {data[:5]!r}, which this fedge does not read; update it")
        if (count, classes) != (count_of(spec), spec.classes):
            raise FormatError(
                f"golden: {count} inputs and {classes} classes, not the {count_of(spec)} "
                f"and {spec.classes} of its spec"
            )
        if len(data) != _HEADER.size + 2 * count * classes:
            raise FormatError(f"golden: {len(data)} bytes, not {_HEADER.size + 2 * count * classes}")
        if not (math.isfinite(budget) and math.copysign(1, budget) > 0):
            raise FormatError(
                f"golden: a latency budget of {budget} s; it must be finite, above 0, or 0 for none"
            )
        x = inputs_of(spec, seed)
        if bytes.fromhex(sha256(x.tobytes())) != digest:
            raise FormatError("golden: made with other inputs than this fedge makes of its seed; update it")
        steps = np.frombuffer(data, "<u2", offset=_HEADER.size).reshape(count, classes)
        return cls(x, (steps / np.float64(_STEPS)).astype(np.float32), budget or math.inf)


def count_of(spec: Spec) -> int:
    """How many inputs a spec has: 16, or fewer where input or answer are so large; 1 or more."""
    by_input = _MAX_ELEMENTS // math.prod(spec.shape)
    by_answer = (MAX_BYTES - _HEADER.size) // (2 * spec.classes)
    return max(1, min(MAX_INPUTS, by_input, by_answer))


def inputs_of(spec: Spec, seed: int) -> npt.NDArray[Any]:
    """The inputs (N, *spec.shape) of a seed: whole-number arithmetic alone, so the same everywhere."""
    made = [_input(spec, seed, i) for i in range(count_of(spec))]
    return np.stack(made).reshape(-1, *spec.shape)  # (N, elements) -> (N, *shape)


def write(
    spec: Spec, seed: int, probabilities: npt.NDArray[np.float32], *, latency_s: float = math.inf
) -> bytes:
    """The file of a variant's answers.

    Args:
        spec: of the variant.
        seed: of the inputs, below 2^64.
        probabilities: (N, classes), answers to `inputs_of(spec, seed)`.
        latency_s: the tier's budget for an answer.

    Raises:
        FormatError: another number of answers or classes, or a probability outside 0 to 1.
    """
    x = inputs_of(spec, seed)
    if probabilities.shape != (len(x), spec.classes):
        raise FormatError(f"golden: probabilities {probabilities.shape}, not {(len(x), spec.classes)}")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():  # NaN too
        raise FormatError(
            "golden: a variant answers with probabilities outside 0 to 1; it cannot be released"
        )
    Golden(x, probabilities, latency_s)
    steps = np.rint(probabilities.astype(np.float64) * _STEPS).astype("<u2")
    budget = 0.0 if math.isinf(latency_s) else latency_s
    digest = bytes.fromhex(sha256(x.tobytes()))
    header = _HEADER.pack(_MAGIC, _SCHEMA, len(x), spec.classes, seed, budget, digest)
    return header + steps.tobytes()


def _input(spec: Spec, seed: int, number: int) -> npt.NDArray[Any]:
    """One input, flat: noise, ramp and zeros in turn; of a text random characters alone."""
    size = math.prod(spec.shape)
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    random = _bits(seed, number * size, size)
    if spec.kind == "text":
        return ((random >> np.uint64(32)) % np.uint64(spec.classes)).astype(dtype)
    if number % 3 == 2:
        return np.zeros(size, dtype)
    if number % 3 == 0:
        fine = random >> np.uint64(40)  # 24 bits: what float32 holds exactly
    else:
        fine = (np.arange(size, dtype=np.uint64) * np.uint64(number << 24) // np.uint64(size)) % np.uint64(
            2**24
        )
    if spec.dtype == "uint8":
        return (fine >> np.uint64(16)).astype(dtype)
    unit = fine.astype(np.float64) * 2.0**-24  # 0 to 1
    if spec.kind == "image":
        return unit.astype(dtype)
    return ((2 * unit - 1) * 4.0 ** (number // 3)).astype(dtype)  # measurements of several orders, both signs


def _bits(seed: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Values of SplitMix64 (Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators)."""
    with np.errstate(over="ignore"):
        position = np.arange(start + 1, start + 1 + count, dtype=np.uint64)
        z = np.uint64(seed) + position * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
