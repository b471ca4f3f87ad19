"""Whole noise that hides one answer among those of a window, drawn on the device: local differential privacy.

The geometric mechanism (Ghosh, Roughgarden, Sundararajan 2009, "Universally utility-maximizing privacy
mechanisms"): each count gets a whole number n with probability proportional to exp(-|n| / scale), drawn
exactly, without floating point, by algorithm 2 of Canonne, Kamath, Steinke 2020 ("The discrete Gaussian for
differential privacy").

**What is promised.** Two windows that differ in one answer differ by one in two bins of each histogram: of F
features, confidence, answer, latency and route. With scale 2 (F + 4) / epsilon whatever is sent is at most
exp(epsilon) times as likely under one as under the other. An answer lies in one window, so further windows
do not weaken it. Of somebody with k answers in each of w windows k w epsilon is promised, which is little: a
person is hidden by noise only where k and w are small. How many answers there were, and the resources used,
are not hidden.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np

from fedge.errors import UserError
from fedge.telemetry.sketch import Sketch, Whole

Below = Callable[[int], int]
"""A random whole number from 0 to below the argument."""

MAX_EPSILON: Final = 100.0
_DENOMINATOR: Final = 1000  # of the epsilon that is used, never above the one that was asked for


@dataclass(frozen=True, slots=True)
class Budget:
    """What a device may tell, and has told.

    Raises:
        UserError: a number is out of range.
    """

    epsilon: float  # of each window, for one answer in it
    most: float | None = None  # over all windows, for somebody with one answer in each; None: no limit
    windows: int = 0  # sent so far

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not 1 / _DENOMINATOR <= self.epsilon <= MAX_EPSILON:
            raise UserError(
                f"telemetry: epsilon = {self.epsilon:g}: must be {1 / _DENOMINATOR} to {MAX_EPSILON:g}"
            )
        if self.most is not None and not self.most > 0:
            raise UserError(f"telemetry: most = {self.most:g}: must be above 0")

    @property
    def spent(self) -> float:
        """By somebody with one answer in each window so far: budgets of windows add up (composition)."""
        return float(self.windows * exact(self.epsilon))

    @property
    def allows(self) -> bool:
        """Whether one more window may be told."""
        return self.most is None or float((self.windows + 1) * exact(self.epsilon)) <= self.most


def exact(epsilon: float) -> Fraction:
    """The fraction that is used in place of an epsilon: not above it."""
    return Fraction(math.floor(epsilon * _DENOMINATOR), _DENOMINATOR)


def noised(sketch: Sketch, epsilon: float, below: Below = secrets.randbelow) -> Sketch:
    """The sketch with noise in every count.

    Args:
        sketch: without noise.
        epsilon: for one answer.
        below: where randomness comes from; a device takes the default.
    """
    scale = 2 * (len(sketch.inputs) + 4) / exact(epsilon)
    return Sketch(*(_added(values, scale, below) for values in sketch.parts().values()))


def discrete_laplace(scale: Fraction, below: Below) -> int:
    """A whole number n with probability (1 - r) / (1 + r) r^|n|, where r = exp(-1 / scale).

    Algorithm 2 of the paper, whose scale is t / s.
    """
    t, s = scale.numerator, scale.denominator
    while True:
        u = below(t)
        if not _bernoulli_exp(Fraction(u, t), below):
            continue
        v = 0
        while _bernoulli_exp(Fraction(1), below):
            v += 1
        magnitude = (u + t * v) // s
        negative = below(2) == 1
        if not (negative and magnitude == 0):
            return -magnitude if negative else magnitude


def _bernoulli_exp(gamma: Fraction, below: Below) -> bool:
    """True with probability exp(-gamma), gamma from 0 to 1 (algorithm 1 of the paper)."""
    k = 1
    while below(gamma.denominator * k) < gamma.numerator:
        k += 1
    return k % 2 == 1


def _added(values: Whole, scale: Fraction, below: Below) -> Whole:
    noise = [discrete_laplace(scale, below) for _ in range(values.size)]
    return values + np.array(noise, np.int64).reshape(values.shape)
