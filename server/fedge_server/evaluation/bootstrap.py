"""The bootstrap: figures of samples drawn from the sample at hand, and the bounds that they give.

Efron 1979, "Bootstrap Methods: Another Look at the Jackknife", percentile bounds. These are too narrow for
few units, since the sample's deviation divides by n and a normal quantile stands in for Student's; so each
tail is taken further out, at Phi(-sqrt(n / (n - 1)) t) instead of alpha (Hesterberg 2015, "What Teachers
Should Know About the Bootstrap", the expanded percentile interval).

Shapes: R resamples, M kinds of examples, n units that are drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Figures = npt.NDArray[np.float64]

TAIL_RESAMPLES: Final = 20  # at least so many resamples lie beyond a bound, whatever the configuration says

MIN_UNITS: Final = 5  # fewer say too little: Student's tails reach beyond all that can be drawn
MIN_TAIL: Final = TAIL_RESAMPLES / 100_000  # no tail is taken further out, so that resamples stay bounded


@dataclass(frozen=True, slots=True)
class Interval:
    """From where to where a figure may truly lie."""

    low: float
    high: float

    def to_json(self) -> list[float]:
        """As a pair."""
        return [self.low, self.high]


def drawn(kinds: npt.ArrayLike, n: int, resamples: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """How many of n drawn examples are of each kind, (R, M): a multinomial draw, so none is ever copied.

    Args:
        kinds: (M,) examples of each kind in the pool.
        n: examples of a resample.
        resamples: R.
        rng: source of the draws.
    """
    pool = np.asarray(kinds, dtype=np.float64)
    return rng.multinomial(n, pool / pool.sum(), size=resamples)


def enough(resamples: int, tail: float) -> int:
    """So many resamples, or more where a tail would hold too few."""
    return max(resamples, math.ceil(TAIL_RESAMPLES / tail))


def expanded(tail: float, units: int) -> float:
    """The share of resamples beyond the bound of a tail, where MIN_UNITS units or more were drawn."""
    from scipy.special import ndtr, stdtrit  # half a second, which not every command needs

    found = float(ndtr(-math.sqrt(units / (units - 1)) * stdtrit(units - 1, 1 - tail)))
    return max(found, min(tail, MIN_TAIL))


def bounds(figures: Figures, tail: float) -> Interval:
    """The bounds beyond which a share `tail` of the figures lies on each side; NaN is left out."""
    known = figures[np.isfinite(figures)]
    low = np.quantile(known, tail, method="inverted_cdf")
    high = np.quantile(known, 1 - tail, method="inverted_cdf")
    return Interval(float(low), float(high))


def mean_interval(
    values: npt.NDArray[np.floating], *, tail: float, resamples: int, rng: np.random.Generator
) -> Interval:
    """The interval of the mean of at least MIN_UNITS units, each of which counts the same."""
    n = len(values)
    beyond = expanded(tail, n)
    count = enough(resamples, beyond)
    means = np.concatenate([values[rng.integers(0, n, (rows, n))].mean(1) for rows in pieces(count, n)])
    return bounds(means, beyond)


def pieces(rows: int, width: int, most: int = 2**22) -> list[int]:
    """Rows of a matrix of this width that are made at a time, so that no piece has over `most` elements."""
    size = max(1, most // max(width, 1))
    return [min(size, rows - start) for start in range(0, rows, size)]
