"""Noise: its distribution, its promise for one answer, and what is spent."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from fedge.errors import UserError
from fedge.telemetry.privacy import Budget, discrete_laplace, exact, noised
from fedge.telemetry.sketch import Sketch


def test_the_noise_has_the_geometric_distribution() -> None:
    below, scale, n = random.Random(7).randrange, Fraction(5, 2), 4000
    drawn = [discrete_laplace(scale, below) for _ in range(n)]
    r = math.exp(-1 / 2.5)
    for value in range(-6, 7):
        p = (1 - r) / (1 + r) * r ** abs(value)
        assert abs(drawn.count(value) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_the_ratio_between_two_windows_that_differ_in_one_answer_is_epsilon() -> None:
    """Every histogram has one answer less in one bin, and one more in another: twice for each of F + 4."""
    features, epsilon = 3, 1.5
    scale = 2 * (features + 4) / exact(epsilon)
    per_count = 1 / float(scale)  # log of the most that one count more or less changes a probability by
    assert per_count * 2 * (features + 4) == pytest.approx(epsilon)


def test_noise_has_mean_0_and_the_deviation_of_its_scale() -> None:
    below = random.Random(1).randrange
    sketch = Sketch.empty(16, 10)
    found = noised(sketch, 4.0, below)
    values = np.concatenate([part.ravel() for part in found.parts().values()])
    scale = 2 * 20 / 4
    assert abs(values.mean()) < 4 * math.sqrt(2) * scale / math.sqrt(len(values))
    assert values.std() == pytest.approx(math.sqrt(2) * scale, rel=0.2)


def test_epsilon_is_never_rounded_up() -> None:
    assert exact(0.3) <= Fraction(3, 10)
    assert exact(1.0009) == 1


def test_what_is_spent_adds_up_and_ends() -> None:
    budget = Budget(0.5, most=1.2, windows=1)
    assert (budget.spent, budget.allows) == (0.5, True)
    assert not Budget(0.5, most=1.2, windows=2).allows
    assert Budget(0.5, windows=10**6).allows


@pytest.mark.parametrize(("epsilon", "most"), [(0.0, None), (101.0, None), (1.0, 0.0), (math.nan, None)])
def test_a_budget_that_is_none_is_refused(epsilon: float, most: float | None) -> None:
    with pytest.raises(UserError, match="must be"):
        Budget(epsilon, most)
