"""Bets against "nothing has changed": evidence that may be looked at always, and does not fade with time.

A device's score is ranked among the scores it had before: p = (1 + number at or above it) / (1 + number).
While a device's windows are exchangeable its ranks are independent and uniform, whatever their distribution
is (V. Vovk et al., "Retrain or not retrain: conformal test martingales for change-point detection", COPA
2021), so that for a falling f with integral 1 each f(p) is 1 on average or less. Devices are independent:
their factors multiply. The bets are f(p) = k p^(k - 1), k in `BETS`.

Nobody knows when a change begins, so bets begin in every period anew (J. Shin, A. Ramdas, A. Rinaldo,
"E-detectors: a nonparametric framework for sequential change detection", New England Journal of Statistics in
Data Science, 2024; after Shiryaev and Roberts):

    evidence_t = (evidence_(t-1) + 1) x product of the factors of period t.

Less t it is a supermartingale that begins with 0. So while nothing changes it takes N periods or more on
average until the evidence reaches N, and within T periods it does so with probability T / N at most
(Lenglart 1977).

No device moves the evidence by more than a room of its own, in logarithms, over its lowest point: a share
of each bet is kept back, decided before the score is seen, which leaves its mean at 1 or less.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

BETS: Final = (
    0.8,
    0.5,
    0.2,
)  # exponents k: from many scores that are somewhat high to few that are very high
LEAST_P: Final = 0.02  # lower ones count as this: one score is never worth more than 1.5, in logarithms
MAX_SCORES: Final = 256  # of a device; then its ranks begin anew
_NOTHING: Final = -700.0  # the logarithm of evidence, or less: exp of it is 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """The logarithm of each bet's evidence."""

    logs: tuple[float, ...] = (_NOTHING,) * len(BETS)

    @property
    def log(self) -> float:
        """The logarithm of their mean."""
        return log_mean(self.logs)

    def next_period(self) -> Evidence:
        """A period begins, and bets with it."""
        return Evidence(tuple(_log_sum((log, 0.0)) for log in self.logs))

    def after(self, p: float, room: float) -> Evidence:
        """After a score with rank p.

        Args:
            p: in (0, 1].
            room: by how much, in logarithms, this device may still raise the evidence; from 0.
        """
        return Evidence(
            tuple(max(log + step(k, p, room), _NOTHING) for log, k in zip(self.logs, BETS, strict=True))
        )


@dataclass(frozen=True, slots=True)
class Ranks:
    """What one device has sent so far, of one stream."""

    scores: tuple[float, ...] = ()  # rising
    raised: float = 0.0  # by how much it has raised the evidence over its lowest point, in logarithms

    def rank(self, score: float) -> float:
        """The p of a new score."""
        above = len(self.scores) - bisect_left(self.scores, score)
        return (1 + above) / (1 + len(self.scores))

    def after(self, score: float, p: float, most: float) -> Ranks:
        """With a score in it.

        Args:
            score: the new one.
            p: its rank.
            most: by which this device may raise the evidence in all.
        """
        scores = list(self.scores) if len(self.scores) < MAX_SCORES else []
        insort(scores, score)
        best = max(step(k, p, most - self.raised) for k in BETS)
        return Ranks(tuple(scores), min(max(self.raised + best, 0.0), most))

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"scores": list(self.scores), "raised": self.raised}

    @classmethod
    def from_json(cls, value: Any) -> Ranks:
        """Of `to_json`."""
        return cls(tuple(map(float, value["scores"])), float(value["raised"]))


def step(k: float, p: float, room: float) -> float:
    """The logarithm of the factor of one bet: 1 - s + s f(p), with s as large as the room allows."""
    if room <= 0:
        return 0.0
    largest = k * LEAST_P ** (k - 1)
    share = min(math.expm1(room) / (largest - 1), 1.0) if room < math.log(largest) else 1.0
    return math.log1p(share * (k * max(p, LEAST_P) ** (k - 1) - 1))


def log_mean(logs: Sequence[float]) -> float:
    """The logarithm of a mean, from logarithms."""
    return _log_sum(logs) - math.log(len(logs))


def _log_sum(logs: Sequence[float]) -> float:
    most = max(logs)
    return most + math.log(sum(math.exp(log - most) for log in logs))
