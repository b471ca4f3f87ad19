"""A threshold from data: for an accuracy, a gap to the cloud or a share that is sent, with a guarantee.

Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei 2021): thresholds are tried in an order that was
fixed before the data were seen, from the one that surely keeps the promise towards the one that is wanted.
Each is tested by the exact binomial tail; the first that fails ends the search (fixed-sequence testing), so
the probability that the threshold given breaks its promise is `1 - confidence` at most, whatever the
distribution. What it holds for: requests that are drawn like the examples. Where they drift, it does not.

Shapes: N examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedge.errors import DataError
from fedge.routing.rules import Float64, Rule

Bool = npt.NDArray[np.bool_]

# Fixed beforehand: always, then doubts from one in a million, fine where good models have theirs, to never.
GRID: Final[Float64] = np.concatenate(
    [[-1.0, 0.0], np.geomspace(1e-6, 0.05, 400), np.linspace(0.051, 1, 950)]
)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A threshold, and what it promises."""

    rule: Rule
    promise: str  # in words
    limit: (
        float  # what is kept below: share of errors, of answers worse than the cloud's, or of requests sent
    )
    confidence: float  # probability, over the draw of the examples, that it is
    seen: float  # the same share among the examples
    sent: float  # share of the examples that would be sent
    examples: int


def for_share(
    doubts: Float64, most: float, *, doubt: str = "confidence", confidence: float = 0.95
) -> Calibrated:
    """The threshold that sends as many as possible, but not more than a share of requests.

    Args:
        doubts: of the device's answers to N examples (N,); no labels are needed.
        most: share of requests, over 0 and below 1.
        doubt: the measure that they are of.
        confidence: of the promise.

    Raises:
        DataError: too few examples to promise anything, or a share that is none.
    """
    _check(doubts, most, confidence, "share")
    said = f"no more than {most:.3g} sent"
    threshold = _last(GRID[::-1], lambda t: doubts > t, len(doubts), most, confidence, said)
    return _found("sent", doubts, doubts > threshold, threshold, most, doubt, confidence)


def for_gap(
    doubts: Float64,
    device: Bool,
    cloud: Bool,
    most: float,
    *,
    doubt: str = "confidence",
    confidence: float = 0.95,
) -> Calibrated:
    """The threshold that sends as few as possible, with answers at most so much worse than the cloud's.

    Counted are answers that the device keeps and gets wrong where the cloud is right; those where it is the
    other way round are not set against them, so the true gap is smaller than the bound.

    Args:
        doubts: of the device's answers to N examples (N,).
        device: whether the device's answer is right (N,).
        cloud: whether the cloud's is (N,).
        most: share of all requests, over 0 and below 1.
        doubt: the measure that `doubts` are of.
        confidence: of the promise.

    Raises:
        DataError: too few examples to promise this, or arrays that do not belong together.
    """
    _check(doubts, most, confidence, "gap", device, cloud)
    lost = cloud & ~device
    said = f"a gap of {most:.3g}"
    threshold = _last(GRID, lambda t: lost & (doubts <= t), len(doubts), most, confidence, said)
    kept = lost & (doubts <= threshold)
    return _found("worse than the cloud", doubts, kept, threshold, most, doubt, confidence)


def for_accuracy(
    doubts: Float64,
    device: Bool,
    cloud: Bool,
    wanted: float,
    *,
    doubt: str = "confidence",
    confidence: float = 0.95,
) -> Calibrated:
    """The threshold that sends as few as possible, with so many answers right; arguments as of `for_gap`.

    Raises:
        DataError: even the cloud alone is not shown to be so good, or arrays that do not belong together.
    """
    _check(doubts, 1 - wanted, confidence, "accuracy", device, cloud)

    def failures(threshold: float) -> Bool:
        return np.where(doubts <= threshold, ~device, ~cloud)

    said = f"accuracy {wanted:.4g}"
    threshold = _last(GRID, failures, len(doubts), 1 - wanted, confidence, said)
    failed = failures(threshold)
    return _found("wrong", doubts, failed, threshold, 1 - wanted, doubt, confidence)


def _check(doubts: Float64, limit: float, confidence: float, what: str, *right: Bool) -> None:
    if not 0 < limit < 1 or not 0 < confidence < 1:
        raise DataError(f"calibration: {what} and confidence must lie between 0 and 1")
    if doubts.ndim != 1 or not len(doubts) or any(each.shape != doubts.shape for each in right):
        raise DataError("calibration: needs one doubt, and one right or wrong of each side, per example")
    if not np.isfinite(doubts).all():
        raise DataError("calibration: a doubt is NaN or infinite")


def _last(
    grid: Float64,
    losses: Callable[[float], Bool],
    examples: int,
    limit: float,
    confidence: float,
    promise: str,
) -> float:
    """The last threshold before the first whose losses do not show that the true share is below the limit."""
    allowed = most_losses(examples, limit, 1 - confidence)
    passed: float | None = None
    for threshold in map(float, grid):
        if losses(threshold).sum() > allowed:
            break
        passed = threshold
    if passed is None:
        raise DataError(
            f"calibration: {examples} examples do not show {promise} at confidence {confidence:g}; "
            "take more examples, or promise less"
        )
    return passed


def most_losses(examples: int, limit: float, level: float) -> int:
    """The largest k with P(Binomial(examples, limit) <= k) <= level; -1: not even none is enough.

    With so many losses or fewer, the upper bound of Clopper and Pearson (1934) at this level is at the
    limit or below it.
    """
    tail, k = -math.inf, -1  # log of P(<= k)
    term = examples * math.log1p(-limit)  # log of P(= 0)
    odds = math.log(limit) - math.log1p(-limit)
    bound = math.log(level)
    for i in range(examples + 1):
        tail = float(np.logaddexp(tail, term))
        if tail > bound:
            return k
        k = i
        if i < examples:
            term += math.log(examples - i) - math.log(i + 1) + odds
    return k


def _found(
    promise: str, doubts: Float64, bad: Bool, threshold: float, limit: float, doubt: str, confidence: float
) -> Calibrated:
    seen, sent = float(bad.mean()), float((doubts > threshold).mean())
    return Calibrated(
        Rule(doubt, threshold), f"at most {limit:.4g} {promise}", limit, confidence, seen, sent, len(doubts)
    )
