"""Means over few runs, with the interval that their number allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CONFIDENCE: Final = 0.95  # of every interval, two-sided


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and how far the true one may lie from it."""

    mean: float
    half_width: float | None  # of Student's t interval at CONFIDENCE; None: one value tells nothing of it
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """As plain values."""
        return {"mean": self.mean, "half_width": self.half_width, "n": self.n}


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values with Student's t interval (normally distributed values assumed)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, None, n)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, quantile(n - 1) * deviation / math.sqrt(n), n)


def corrected(values: Sequence[float], ratio: float, confidence: float) -> dict[str, float]:
    """Mean, deviation and interval over the parts of a cross-validation.

    Nadeau and Bengio 2003, Inference for the Generalization Error: trainings that share data agree more than
    independent ones would, so the variance of their mean is (1/k + n_test/n_train) s^2 and not s^2/k,
    with Student's t of k - 1 degrees.

    Args:
        values: of a metric, one for each of k parts, at least two.
        ratio: examples tested on over examples trained on, of a part.
        confidence: of the interval, two-sided.
    """
    k = len(values)
    mean = math.fsum(values) / k
    variance = math.fsum((value - mean) ** 2 for value in values) / (k - 1)
    half = quantile(k - 1, confidence) * math.sqrt((1 / k + ratio) * variance)
    return {"mean": mean, "std": math.sqrt(variance), "low": mean - half, "high": mean + half}


def quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Of Student's t, for a two-sided interval."""
    from scipy.special import stdtrit  # half a second, which --help must not take

    return float(stdtrit(degrees, (1 + confidence) / 2))
