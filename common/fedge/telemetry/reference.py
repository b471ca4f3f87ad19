"""What a release's inputs and answers looked like when it was made: edges of bins, and counts in them.

A device needs the edges to count its inputs; the server compares with the counts. It is made where data is:
of the server's own (`Reference.of`); or of clients', who send coarse histograms, which are added up and
give the edges (`deciles`), and then sketches by these edges (`asking`, `counting`). It holds no example: at
most nine edges of each feature, rounded, each of which lies between many examples.

As bytes it is canonical JSON, so that one reference has one digest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from fedge.canonical import canonical
from fedge.errors import DataError, FormatError
from fedge.files import sha256
from fedge.spec import Spec
from fedge.telemetry.sketch import (
    BINS,
    CELLS,
    CONFIDENCE_BINS,
    MAX_ANSWERS,
    MAX_COUNT,
    Floats,
    Sketch,
    Whole,
    answers_of,
    binned,
    counted,
    padded,
)
from fedge.telemetry.views import MAX_FEATURES, features_of, names_of

FORMAT: Final = 1
MAX_BYTES: Final = 256 * 1024
LEAST_EXAMPLES: Final = 100  # of fewer, an edge would tell too much of one of them, and too little of all
_DIGITS: Final = 4  # of an edge
_MAX_NAME: Final = 200  # characters


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Edges and counts of a release.

    Raises:
        FormatError: they do not fit together.
    """

    names: tuple[str, ...]  # of the F features
    edges: tuple[Floats, ...]  # of each feature, rising, 0 to BINS - 1 of them
    inputs: Whole  # (F, CELLS)
    confidence: Whole  # (CONFIDENCE_BINS,)
    answers: Whole  # (min(classes, MAX_ANSWERS),)
    digest: str = field(init=False)  # SHA-256 of the bytes
    _grid: Floats = field(init=False, repr=False)  # the edges, as `binned` takes them

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not len(self.names) == len(self.edges) == len(self.inputs) <= MAX_FEATURES:
            raise FormatError(f"reference: {len(self.names)} names, {len(self.edges)} lists of edges")
        if any(not 0 < len(name) <= _MAX_NAME for name in self.names):
            raise FormatError(f"reference: a feature's name has 1 to {_MAX_NAME} characters")
        for name, own in zip(self.names, self.edges, strict=True):
            if len(own) >= BINS or not np.isfinite(own).all() or (np.diff(own) <= 0).any():
                raise FormatError(f"reference: the edges of {name!r} are not rising, or too many")
        object.__setattr__(self, "_grid", padded(self.edges))
        shapes = ((self.inputs, (len(self.names), CELLS)), (self.confidence, (CONFIDENCE_BINS,)))
        if any(values.shape != shape for values, shape in shapes):
            raise FormatError("reference: its histograms have other sizes")
        if not 2 <= len(self.answers) <= MAX_ANSWERS:
            raise FormatError(f"reference: {len(self.answers)} classes")
        for values in (self.inputs, self.confidence, self.answers):
            if values.dtype != np.int64 or (values < 0).any() or (values > MAX_COUNT).any():
                raise FormatError("reference: a count is none")
        object.__setattr__(self, "digest", sha256(self.to_bytes()))

    @classmethod
    def of(cls, x: npt.NDArray[Any], probabilities: npt.NDArray[Any], spec: Spec) -> Self:
        """From examples and what the variant answers to them.

        Args:
            x: (N, *spec.shape) raw, of the server's own.
            probabilities: (N, classes).
            spec: of the release.

        Raises:
            DataError: there are too few.
        """
        if len(x) < LEAST_EXAMPLES:
            raise DataError(f"reference: {len(x)} examples are fewer than {LEAST_EXAMPLES}")
        features = features_of(x, spec)
        edges = tuple(_deciles(column) for column in features.T)
        answers, confidence = answers_of(probabilities)
        inputs = counted(binned(features, padded(edges)), CELLS)
        return cls(names_of(spec), edges, inputs, confidence, answers)

    @classmethod
    def asking(cls, spec: Spec, edges: Sequence[Floats]) -> Self:
        """Without counts: what clients are sent that are to count their own examples by these edges.

        Args:
            spec: of the release.
            edges: of each feature, such as `deciles` gives.
        """
        empty = Sketch.empty(len(edges), spec.classes)
        return cls(names_of(spec), tuple(edges), empty.inputs, empty.confidence, empty.answers)

    def counting(self, sketch: Sketch) -> Self:
        """The same edges, with the counts of a sketch: the sum of what clients have counted by them.

        Raises:
            FormatError: it was counted by others, or of too few examples.
        """
        if sketch.inputs.shape != self.inputs.shape or sketch.answers.shape != self.answers.shape:
            raise FormatError("reference: the sketch is of another model")
        if sketch.count < LEAST_EXAMPLES:
            raise FormatError(f"reference: {sketch.count} examples are fewer than {LEAST_EXAMPLES}")
        parts = (np.maximum(part, 0) for part in (sketch.inputs, sketch.confidence, sketch.answers))
        return type(self)(self.names, self.edges, *parts)

    def sketched(self, x: npt.NDArray[Any], spec: Spec) -> Whole:
        """Histograms (F, CELLS) of raw examples (N, *spec.shape)."""
        return counted(binned(features_of(x, spec), self._grid), CELLS)

    def to_bytes(self) -> bytes:
        """Canonical."""
        value = {
            "format": FORMAT,
            "names": list(self.names),
            "edges": [own.tolist() for own in self.edges],
            "inputs": self.inputs.tolist(),
            "confidence": self.confidence.tolist(),
            "answers": self.answers.tolist(),
        }
        return canonical(value, "reference")

    @classmethod
    def from_bytes(cls, data: bytes, spec: Spec) -> Self:
        """Read what came over a network.

        Raises:
            FormatError: it is none, too long, or of another model.
        """
        if len(data) > MAX_BYTES:
            raise FormatError(f"reference: {len(data)} bytes are more than {MAX_BYTES}")
        try:
            value = json.loads(data)
            if not isinstance(value, dict) or value.get("format") != FORMAT:
                raise FormatError(f"reference: format is not {FORMAT}; update this device")
            names = tuple(value["names"])
            if not all(isinstance(name, str) for name in names):
                raise TypeError("names must be text")
            edges = tuple(_numbers(own) for own in value["edges"])
            inputs = _counts(value["inputs"]).reshape(-1, CELLS)
            found = cls(names, edges, inputs, _counts(value["confidence"]), _counts(value["answers"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise FormatError(f"reference: malformed ({type(error).__name__}: {str(error)[:120]})") from error
        if found.names != names_of(spec) or len(found.answers) != min(spec.classes, MAX_ANSWERS):
            raise FormatError("reference: is of another model; its features or classes differ")
        return found


def deciles(edges: Floats, counts: Whole) -> Floats:
    """Inner edges of a feature from a histogram over finer bins, such as clients have added up.

    Args:
        edges: (B + 1,) of the finer bins, rising.
        counts: (B,) in them; at least one.
    """
    total = np.concatenate([[0], np.cumsum(counts)])
    wanted = np.arange(1, BINS) / BINS * total[-1]
    return _distinct(np.interp(wanted, total, edges))


def _deciles(values: Floats) -> Floats:
    present = values[~np.isnan(values)]
    if not len(present):
        return np.empty(0)
    return _distinct(np.quantile(present, np.arange(1, BINS) / BINS))


def _distinct(values: Floats) -> Floats:
    """Each once, rounded to four digits of their spread: an edge must not be one example's value."""
    scale = float(np.abs(values).max()) if len(values) else 0.0
    if not scale > 0:
        return np.unique(values)
    spread = float(values.max() - values.min()) or scale
    digits = min(_DIGITS - 1 - math.floor(math.log10(spread)), 15)
    return np.unique(np.round(values, digits) + 0.0)


def _numbers(values: Sequence[object]) -> Floats:
    if not isinstance(values, list) or len(values) >= BINS:
        raise ValueError("edges must be short lists")
    if not all(type(value) in (int, float) for value in values):
        raise TypeError("edges must be numbers")
    return np.array(values, np.float64)


def _counts(values: object) -> Whole:
    found = np.array(values)
    if found.dtype != np.int64:
        raise TypeError("counts must be whole numbers")
    return found
