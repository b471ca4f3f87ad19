"""Histograms over fixed bins of what a device has answered: adding two is the sketch of both together.

- **inputs**: of each feature (`views`), ten bins between edges that a release's reference fixes, and one for
  missing values. The edges are deciles of the reference, so that each bin holds as much of it as any other
  (Mann and Wald 1942, "On the choice of the number of class intervals").
- **confidence**: 20 equal bins from 0 to 1. **answers**: by class; from the 256th on they share a bin.
- **latency**: bins that grow by the fourth root of 2, so that a quantile is told within 9 % of itself
  (Masson, Rim, Lee 2019, "DDSketch: a fast and fully-mergeable quantile sketch").
- **routes**: how each request ended.

A sketch is as large whether it holds ten answers or a million.

Legend: N examples, F features, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

BINS: Final = 10  # of a feature
CELLS: Final = BINS + 1  # the last one: missing
CONFIDENCE_BINS: Final = 20
MAX_ANSWERS: Final = 256
# One for each request: the device answered; the cloud did; the device, since the cloud was late, or failed;
# nobody.
ROUTES: Final = ("local", "cloud", "cloud_timeout", "cloud_failed", "error")
OCTAVES: Final = (-17, 7)  # of seconds: 8 microseconds to 2 minutes; beyond counts as the last bin
PER_OCTAVE: Final = 4
LATENCY_BINS: Final = (OCTAVES[1] - OCTAVES[0]) * PER_OCTAVE
MAX_COUNT: Final = 2**40

Whole = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """Numbers of answers by bin, int64; below 0 only where noise was added.

    Raises:
        ValueError: shapes, dtypes or numbers that no sketch has.
    """

    inputs: Whole  # (F, CELLS)
    confidence: Whole  # (CONFIDENCE_BINS,)
    answers: Whole  # (min(K, MAX_ANSWERS),)
    latency: Whole  # (LATENCY_BINS,)
    routes: Whole  # (len(ROUTES),)

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        shapes = {"confidence": CONFIDENCE_BINS, "latency": LATENCY_BINS, "routes": len(ROUTES)}
        for name, values in self.parts().items():
            wanted = (shapes[name],) if name in shapes else values.shape
            if values.dtype != np.int64 or values.shape != wanted:
                raise ValueError(f"{name} is {values.dtype} {values.shape}")
            if values.size and np.abs(values).max() > MAX_COUNT:
                raise ValueError(f"{name} counts more than {MAX_COUNT}")
        if self.inputs.ndim != 2 or self.inputs.shape[1] != CELLS:
            raise ValueError(f"inputs are {self.inputs.shape}, not (F, {CELLS})")
        if self.answers.ndim != 1 or not 2 <= len(self.answers) <= MAX_ANSWERS:
            raise ValueError(f"answers are {self.answers.shape}")

    @classmethod
    def empty(cls, features: int, classes: int) -> Self:
        """Of no answer.

        Args:
            features: F; 0 where there is no reference to compare inputs with.
            classes: K.
        """
        sizes = ((features, CELLS), CONFIDENCE_BINS, min(classes, MAX_ANSWERS), LATENCY_BINS, len(ROUTES))
        return cls(*(np.zeros(size, np.int64) for size in sizes))

    @classmethod
    def sum(cls, parts: Iterable[Self]) -> Self:
        """All of them together; at least one.

        Raises:
            ValueError: there is none, or they are of different sizes.
        """
        parts = list(parts)
        if not parts or len({(part.inputs.shape, part.answers.shape) for part in parts}) != 1:
            raise ValueError("sketches: nothing to add, or of different sizes")
        return cls(*(np.sum([getattr(part, f.name) for part in parts], axis=0) for f in fields(cls)))

    def parts(self) -> dict[str, Whole]:
        """The histograms by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def count(self) -> int:
        """Answers that it holds; with noise, about so many."""
        return max(int(self.answers.sum()), 0)

    @property
    def is_exact(self) -> bool:
        """Whether these can be counts without noise: one bin of each histogram for each answer."""
        n, everything = int(self.answers.sum()), self.parts().values()
        same = int(self.confidence.sum()) == n and bool((self.inputs.sum(1) == n).all())
        return (
            same and n <= int(self.routes.sum()) and all(bool((values >= 0).all()) for values in everything)
        )


def padded(edges: Sequence[Floats]) -> Floats:
    """Edges of each feature as one array (F, BINS - 1), for `binned`: those that are absent are infinite."""
    found = np.full((len(edges), BINS - 1), np.inf)
    for row, own in zip(found, edges, strict=True):
        row[: len(own)] = own
    return found


def binned(features: Floats, edges: Floats) -> Whole:
    """Which bin each value falls in, (N, F); CELLS - 1 is missing.

    Args:
        features: (N, F).
        edges: (F, BINS - 1), rising: bin i holds what is at or above edge i - 1.
    """
    found: Whole = (features[:, :, None] >= edges).sum(2, dtype=np.int64)  # NaN is at or above nothing
    found[np.isnan(features)] = CELLS - 1
    return found


def counted(bins: Whole, cells: int) -> Whole:
    """Histograms (F, cells) of bins (N, F)."""
    offsets = np.arange(bins.shape[1]) * cells
    flat = np.bincount((bins + offsets).ravel(), minlength=bins.shape[1] * cells)
    return flat.astype(np.int64).reshape(bins.shape[1], cells)


def answers_of(probabilities: npt.NDArray[Any]) -> tuple[Whole, Whole]:
    """Histograms of the answers and of their confidence.

    Args:
        probabilities: (N, K), finite.
    """
    best = np.minimum(probabilities.argmax(1), MAX_ANSWERS - 1)
    answers = np.bincount(best, minlength=min(probabilities.shape[1], MAX_ANSWERS))
    places = np.clip((probabilities.max(1) * CONFIDENCE_BINS).astype(np.int64), 0, CONFIDENCE_BINS - 1)
    confidence = np.bincount(places, minlength=CONFIDENCE_BINS)
    return answers.astype(np.int64), confidence.astype(np.int64)


def latency_bin(seconds: float) -> int:
    """Where a latency is counted."""
    if not seconds > 0:
        return 0
    place = math.floor(PER_OCTAVE * (math.log2(seconds) - OCTAVES[0]))
    return min(max(place, 0), LATENCY_BINS - 1)


def latency_quantile(latency: Whole, q: float) -> float | None:
    """Seconds under which a share q of the latencies lie, within 9 %; None without any.

    Args:
        latency: a sketch's; noise below 0 counts as nothing.
        q: from 0 to 1.
    """
    counts = np.maximum(latency, 0)
    total = int(counts.sum())
    if not total:
        return None
    place = int(np.searchsorted(np.cumsum(counts), max(math.ceil(q * total), 1)))
    return float(2.0 ** (OCTAVES[0] + (place + 0.5) / PER_OCTAVE))


def mean_confidence(confidence: Whole) -> float | None:
    """Mean over the answers, by the middles of the bins; None without any."""
    total = int(confidence.sum())
    if total <= 0:
        return None
    middles = (np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS
    return float(np.clip((confidence * middles).sum() / total, 0.0, 1.0))
