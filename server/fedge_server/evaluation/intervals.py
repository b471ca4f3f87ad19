"""Confidence intervals of a global model's metrics over the examples, or the clients, of the test data.

Where the test data name at least MIN_CLIENTS natural clients, whole clients are drawn (Davison and Hinkley
1997, section 3.8: examples of one client are alike, and counting them as independent claims too much). Else
examples are: for macro_f1 and auc class by class, since a resample without a class has neither; for
accuracy and loss over all of them.

Shapes: N examples, K clients, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from fedge.dataset import NOBODY, Indices
from fedge_server.evaluation import bootstrap
from fedge_server.evaluation.bootstrap import Figures, Interval

MIN_CLIENTS: Final = 10  # fewer clients say too little of how clients differ
METRICS: Final = ("accuracy", "loss", "macro_f1", "auc")  # that an interval can be given for

_STREAM: Final = 0xB0075  # tells these draws from others of the same seed

Weighed = Callable[["Answered", Figures], Figures]
"""A metric of R weighted samples: how often each example is in each, (R, N), to (R,)."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A model's answers to labelled examples."""

    probabilities: npt.NDArray[np.floating]  # (N, C)
    y: npt.NDArray[np.int64]  # (N,)
    clients: Indices | None  # (N,) 0 .. K - 1, where whole clients are to be drawn; None: examples are

    @classmethod
    def of(
        cls, probabilities: npt.NDArray[np.floating], y: npt.NDArray[np.int64], owners: Indices | None
    ) -> Self:
        """The same, with clients where they are enough.

        Args:
            probabilities: (N, C).
            y: (N,) true classes.
            owners: (N,) natural client of each example, by any codes; None: not known.
        """
        if owners is None or len(owners) == 0 or owners.min() == NOBODY:
            return cls(probabilities, y, None)
        named, codes = np.unique(owners, return_inverse=True)
        return cls(probabilities, y, codes if len(named) >= MIN_CLIENTS else None)

    @property
    def over(self) -> str:
        """What is drawn."""
        return "examples" if self.clients is None else "clients"

    @property
    def units(self) -> int:
        """How many of these there are."""
        return len(self.y) if self.clients is None else int(self.clients.max()) + 1


def interval(metric: str, answered: Answered, *, tail: float, resamples: int, seed: int) -> Interval | None:
    """From where to where a metric may truly lie; None where fewer than MIN_UNITS say too little of it.

    Args:
        metric: one of METRICS; auc with two classes only.
        answered: what it is measured on.
        tail: probability of lying beyond either bound, such as 0.025 for an interval at 95 %.
        resamples: R at least.
        seed: decides the draws: the same for all rounds of a run, so that bounds move only with the answers.
    """
    if answered.units < bootstrap.MIN_UNITS:
        return None
    if metric == "accuracy":
        return _of_accuracy(answered, tail, resamples, _rng(seed))
    return _by_weights(metric, answered, tail, resamples, _rng(seed))


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, _STREAM])


def _of_accuracy(answered: Answered, tail: float, resamples: int, rng: np.random.Generator) -> Interval:
    """Of a share; over clients it is never narrower than over examples, even where all clients are alike.

    Below one wrong answer that was not observed joins those that are drawn, above one right one: a sample
    without an error can only draw none, and would claim certainty from any number of examples. It is what
    the gate does (`fedge_server.compression.gate`), and what exact (Clopper-Pearson) limits say too.
    """
    n = len(answered.y)
    right = int((answered.probabilities.argmax(1) == answered.y).sum())
    beyond = bootstrap.expanded(tail, n)
    count = bootstrap.enough(resamples, beyond)
    low = bootstrap.drawn((right, n - right + 1), n, count, rng)[:, 0] / n
    high = bootstrap.drawn((right + 1, n - right), n, count, rng)[:, 0] / n
    found = Interval(bootstrap.bounds(low, beyond).low, bootstrap.bounds(high, beyond).high)
    if answered.clients is None:
        return found
    apart = _by_weights("accuracy", answered, tail, resamples, rng)
    return Interval(min(found.low, apart.low), max(found.high, apart.high))


def _by_weights(
    metric: str, answered: Answered, tail: float, resamples: int, rng: np.random.Generator
) -> Interval:
    weighed = WEIGHED[metric]
    beyond = bootstrap.expanded(tail, answered.units)
    by_class = metric in ("macro_f1", "auc")
    rows = bootstrap.pieces(bootstrap.enough(resamples, beyond), len(answered.y))
    figures = [weighed(answered, _weights(answered, count, rng, by_class=by_class)) for count in rows]
    return bootstrap.bounds(np.concatenate(figures), beyond)


def _weights(answered: Answered, rows: int, rng: np.random.Generator, *, by_class: bool) -> Figures:
    """How often each example is in each resample, (R, N)."""
    n = len(answered.y)
    if answered.clients is not None:
        clients = answered.units
        often = bootstrap.drawn(np.ones(clients), clients, rows, rng)  # (R, K)
        return often[:, answered.clients].astype(np.float64)
    found = np.zeros((rows, n))
    strata = [np.flatnonzero(answered.y == label) for label in np.unique(answered.y)] if by_class else []
    for members in strata or [np.arange(n)]:
        size = len(members)
        places = rng.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        found[:, members] = np.bincount(places.ravel(), minlength=rows * size).reshape(rows, size)
    return found


def _accuracy(answered: Answered, weights: Figures) -> Figures:
    right = (answered.probabilities.argmax(1) == answered.y).astype(np.float64)
    found: Figures = weights @ right / weights.sum(1)
    return found


def _loss(answered: Answered, weights: Figures) -> Figures:
    chosen = answered.probabilities[np.arange(len(answered.y)), answered.y].astype(np.float64)
    found: Figures = weights @ -np.log(np.clip(chosen, 1e-12, 1.0)) / weights.sum(1)
    return found


def _macro_f1(answered: Answered, weights: Figures) -> Figures:
    """From the counts of each (true, predicted); a class that is neither has 0."""
    classes = answered.probabilities.shape[1]
    cell = answered.y * classes + answered.probabilities.argmax(1)  # (N,)
    order = np.argsort(cell, kind="stable")
    kinds, starts = np.unique(cell[order], return_index=True)
    counts = np.add.reduceat(weights[:, order], starts, axis=1)  # (R, M) of the M cells that occur
    true, predicted = np.eye(classes)[kinds // classes], np.eye(classes)[kinds % classes]  # (M, C)
    hits = counts @ (true * predicted)  # (R, C)
    whole = counts @ (true + predicted)
    found: Figures = np.divide(2 * hits, whole, out=np.zeros_like(whole), where=whole > 0).mean(1)
    return found


def _auc(answered: Answered, weights: Figures) -> Figures:
    """Of two classes: how often a positive example scores above a negative one, ties being half."""
    scores = answered.probabilities[:, 1]
    order = np.argsort(scores, kind="stable")
    ranked, positive = scores[order], answered.y[order] == 1
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights[:, order] * ~positive, 1)], 1)
    first = np.searchsorted(ranked, ranked, side="left")
    last = np.searchsorted(ranked, ranked, side="right")
    beaten = (
        below[:, first] + below[:, last]
    ) / 2  # (R, N) negatives below each example, and half of its equals
    own = weights[:, order] * positive
    with np.errstate(invalid="ignore", divide="ignore"):  # a draw of clients may have one class only: NaN
        found: Figures = (own * beaten).sum(1) / (own.sum(1) * below[:, -1])
    return found


WEIGHED: Final[dict[str, Weighed]] = {
    "accuracy": _accuracy, "loss": _loss, "macro_f1": _macro_f1, "auc": _auc,
}  # fmt: skip


def stated(
    metrics: Sequence[str], answered: Answered, *, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """Two-sided intervals of these metrics as far as there is one, and what they were drawn over."""
    tail = (1 - confidence) / 2
    found = {
        name: interval(name, answered, tail=tail, resamples=resamples, seed=seed)
        for name in metrics
        if name in METRICS
    }
    pairs = {name: value.to_json() for name, value in found.items() if value is not None}
    if not pairs:
        return {}
    return {"confidence": confidence, "over": answered.over, "units": answered.units, **pairs}
