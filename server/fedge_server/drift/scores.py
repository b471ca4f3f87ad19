"""How far a window's histograms are from others, in units of what chance alone makes of them.

Of a histogram with an order (a feature's bins, confidence) the squared distance between the cumulative shares
is taken, as Cramer and von Mises do (Anderson 1962, "On the distribution of the two-sample Cramer-von Mises
criterion"), of answers that between the shares themselves. Divided by what it is expected to be for samples
of these sizes it is about 1 without a change, whatever the number of answers. It may be noisy: nothing here
relies on a distribution of the scores, only on their order (`detector`, `permutation`).

Legend: F features, B bins, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.telemetry.reference import Reference
from fedge.telemetry.sketch import BINS, Sketch

STREAMS: Final = ("inputs", "confidence", "answers")
_PRIOR: Final = 0.5  # of Jeffreys, in each bin: an empty one has a spread too

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """The histograms of a sketch that drift is looked for in: all that a baseline has to keep."""

    inputs: Floats  # (F, BINS + 1) counts, the last of what is missing
    confidence: Floats  # (bins,)
    answers: Floats  # (K,)

    @classmethod
    def of(cls, found: Sketch | Reference) -> Shapes:
        """Those of a window, or of a release's reference."""
        parts = (found.inputs, found.confidence, found.answers)
        return cls(*(values.astype(np.float64) for values in parts))

    def __add__(self, other: Shapes) -> Shapes:
        return Shapes(
            self.inputs + other.inputs,
            self.confidence + other.confidence,
            self.answers + other.answers,
        )

    @property
    def count(self) -> float:
        """Answers in it."""
        return float(self.answers.sum())

    def fits(self, other: Shapes) -> bool:
        """Whether the two can be compared."""
        return self.inputs.shape == other.inputs.shape and self.answers.shape == other.answers.shape


def distances(window: Shapes, baseline: Shapes) -> dict[str, float]:
    """Of each stream that both hold something of; about 1 without a change.

    Args:
        window: the newer one.
        baseline: what it is compared with.
    """
    found = {
        "confidence": _ordered(window.confidence[None], baseline.confidence[None]),
        "answers": _unordered(window.answers, baseline.answers),
    }
    if len(window.inputs):
        found["inputs"] = _features(window.inputs, baseline.inputs)
    return {name: float(found[name]) for name in STREAMS if name in found}


def feature_shifts(window: Shapes, baseline: Shapes) -> Floats:
    """(F + 2, BINS + 1 at least) differences of cumulative shares, by which `permutation` finds what changed.

    The rows are the features, confidence and answers, filled up with 0.
    """
    width = max(BINS + 1, len(window.confidence), len(window.answers))
    rows = [
        *(
            _cumulative(a[None])[0] - _cumulative(b[None])[0]
            for a, b in zip(window.inputs, baseline.inputs, strict=True)
        ),
        (_cumulative(window.confidence[None]) - _cumulative(baseline.confidence[None]))[0],
        _shares(window.answers) - _shares(baseline.answers),
    ]
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def _features(window: Floats, baseline: Floats) -> float:
    """Of all features together: their distances over their expectations, both added up."""
    ordered = _ordered_parts(window[:, :BINS], baseline[:, :BINS])
    missing = _ordered_parts(_presence(window), _presence(baseline))
    return (ordered[0] + missing[0]) / (ordered[1] + missing[1])


def _presence(counts: Floats) -> Floats:
    """(F, 2): present and missing."""
    return np.stack([counts[:, :BINS].sum(1), counts[:, BINS]], axis=1)


def _ordered(window: Floats, baseline: Floats) -> float:
    distance, expected = _ordered_parts(window, baseline)
    return distance / expected


def _ordered_parts(window: Floats, baseline: Floats) -> tuple[float, float]:
    """Squared distance of cumulative shares (F, B), and what chance makes of it."""
    f, g = _cumulative(window), _cumulative(baseline)
    inverse = 1 / _size(window) + 1 / _size(baseline)  # (F, 1)
    return float(np.square(f - g).sum()), float((g * (1 - g) * inverse).sum())


def _unordered(window: Floats, baseline: Floats) -> float:
    """The same of shares (K,)."""
    p, q = _shares(window), _shares(baseline)
    inverse = 1 / float(_size(window[None])[0, 0]) + 1 / float(_size(baseline[None])[0, 0])
    return float(np.square(p - q).sum() / ((q * (1 - q)).sum() * inverse))


def _cumulative(counts: Floats) -> Floats:
    """(F, B) counts, which noise may have put below 0, to cumulative shares."""
    padded = counts + _PRIOR
    found: Floats = np.cumsum(padded, axis=1) / np.maximum(padded.sum(1, keepdims=True), 1.0)
    return found


def _shares(counts: Floats) -> Floats:
    padded = counts + _PRIOR
    return padded / max(float(padded.sum()), 1.0)


def _size(counts: Floats) -> Floats:
    """(F, 1) answers in each histogram."""
    found: Floats = np.maximum(counts.sum(1, keepdims=True), 1.0)
    return found
