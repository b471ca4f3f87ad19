"""Bets against "nothing has changed": evidence that may be looked at always, and does not fade with time.

A device's score is ranked among the scores it had before: p = (1 + number at or above it) / (1 + number).
While a device's windows are exchangeable its ranks are independent and uniform, whatever their distribution
is (V. Vovk et al., "Retrain or not retrain: conformal test martingales for change-point detection", COPA
2021), so that for a falling f with integral 1 each f(p) is 1 on average or less. Devices are independent:
their factors multiply. A bet says that a share s of the devices has changed, and that their scores are
among the highest b: f(p) = 1 - s + s / b where p <= b, else 1 - s.

Nobody knows when a change begins, so bets begin in every period anew (J. Shin, A. Ramdas, A. Rinaldo,
"E-detectors: a nonparametric framework for online change detection", 2024; after Shiryaev and Roberts):

    evidence_t = (evidence_(t-1) + 1) x product of the factors of period t.

Less t it is a supermartingale that begins with 0. So while nothing changes it takes N periods or more on
average until the evidence reaches N, and within T periods it does so with probability T / N at most
(Lenglart 1977).

No device moves a bet's evidence by more than a room of its own, in logarithms, over its lowest point: a part
of the bet XX false alarms at most exp(k room) times as frequent.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Bet:
    """What a factor is."""

    share: float  # of the devices that have changed
    below: float  # their ranks

    def step(self, p: float, room: float) -> float:
        """The logarithm of the factor of a rank p, with as much kept back as the room demands."""
        if room <= 0:
            return 0.0
        largest = 1 - self.share + self.share / self.below
        part = math.expm1(room) / (largest - 1) if room < math.log(largest) else 1.0
        factor = largest if p <= self.below + 1e-12 else 1 - self.share
        return math.log1p(part * (factor - 1))


BETS: Final = tuple(Bet(share, below) for share, below in product((0.1, 0.3, 0.8), (0.05, 0.2)))
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

    def after(self, steps: Sequence[float]) -> Evidence:
        """After a score, by its steps."""
        return Evidence(tuple(max(log + step, _NOTHING) for log, step in zip(self.logs, steps, strict=True)))


@dataclass(frozen=True, slots=True)
class Ranks:
    """What one device has sent so far, of one stream."""

    scores: tuple[float, ...] = ()  # rising
    # By how much it has raised each bet's evidence over its lowest point, in logarithms.
    raised: tuple[float, ...] = (0.0,) * len(BETS)

    def rank(self, score: float) -> float:
        """The p of a new score."""
        above = len(self.scores) - bisect_left(self.scores, score)
        return (1 + above) / (1 + len(self.scores))

    def steps(self, score: float, most: float) -> tuple[float, ...]:
        """By how much a new score moves the logarithm of each bet's evidence.

        Args:
            score: the new one.
            most: by which this device may raise it in all.
        """
        p = self.rank(score)
        return tuple(bet.step(p, most - raised) for bet, raised in zip(BETS, self.raised, strict=True))

    def after(self, score: float, steps: Sequence[float]) -> Ranks:
        """With a score in it, by its steps."""
        scores = list(self.scores) if len(self.scores) < MAX_SCORES else []
        insort(scores, score)
        raised = tuple(max(own + step, 0.0) for own, step in zip(self.raised, steps, strict=True))
        return Ranks(tuple(scores), raised)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"scores": list(self.scores), "raised": list(self.raised)}

    @classmethod
    def from_json(cls, value: Any) -> Ranks:
        """Of `to_json`."""
        return cls(tuple(map(float, value["scores"])), tuple(map(float, value["raised"])))


def log_mean(logs: Sequence[float]) -> float:
    """The logarithm of a mean, from logarithms."""
    return _log_sum(logs) - math.log(len(logs))


def _log_sum(logs: Sequence[float]) -> float:
    most = max(logs)
    return most + math.log(sum(math.exp(log - most) for log in logs))
