"""Clipping and noise: worked by hand where numbers are given."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedge.noise import (
    SLACK,
    clip_factor,
    derived_key,
    gaussian,
    noise_on_grid,
    on_grid,
    share_sigma,
    step_of,
)

KEY = bytes(range(32))


def test_the_step_is_a_power_of_two_a_millionth_of_the_deviation():
    assert step_of(1.0, 1.0) == 2.0**-20
    assert step_of(1.0, 3.0) == 2.0**-19
    assert step_of(1.0, 1e-9) == 2.0**-30  # with next to no noise, as fine as sums stay exact


def test_what_is_short_enough_stays_and_what_is_long_gets_the_norm():
    assert clip_factor(0.0, 2.0) == 1.0
    assert clip_factor(1.99, 2.0) == 1.0
    assert clip_factor(8.0, 2.0) == pytest.approx(0.25)
    assert clip_factor(8.0, 2.0) * 8.0 <= 2.0 * (1 - SLACK)


def test_cutting_to_the_grid_never_lengthens():
    values = np.array([0.74, -0.74, 0.25, -0.1])
    assert on_grid(values, 1.0, 0.25).tolist() == [2, -2, 1, 0]
    assert on_grid(values, 0.5, 0.25).tolist() == [1, -1, 0, 0]
    many = np.random.default_rng(0).normal(size=10_000)
    assert np.linalg.norm(on_grid(many, clip_factor(np.linalg.norm(many), 1.0), 2.0**-20)) * 2.0**-20 <= 1.0


def test_noise_is_the_same_for_the_same_key_and_name_only():
    first = noise_on_grid(KEY, "w", 1001, 1.0, 2.0**-20)
    assert (first == noise_on_grid(KEY, "w", 1001, 1.0, 2.0**-20)).all()
    assert (first[:7] == noise_on_grid(KEY, "w", 7, 1.0, 2.0**-20)).all()
    for key, name in ((KEY, "b"), (derived_key(1), "w")):
        assert (first == noise_on_grid(key, name, 1001, 1.0, 2.0**-20)).mean() < 0.01
    with pytest.raises(ValueError, match="32 bytes, not 3"):
        gaussian(b"abc", "w", 1)


def test_noise_is_whole_steps_so_that_adding_and_rounding_are_one():
    """x + round(g) = round(x + g): the proof that the grid takes no privacy away."""
    step = step_of(1.0, 0.5)
    noise = noise_on_grid(KEY, "w", 1000, 0.5, step)
    assert (noise == np.rint(noise)).all()
    exact = gaussian(KEY, "w", 1000) * 0.5 / step
    x = on_grid(np.linspace(-1, 1, 1000), 1.0, step)
    assert (np.rint(x + exact) == x + noise).mean() > 0.999  # halves, and the last bit of x + exact, apart


def test_noise_is_normal():
    from scipy import stats

    values = gaussian(KEY, "w", 300_001)
    assert stats.kstest(values, "norm").pvalue > 0.001  # of a fixed key: it holds or it does not
    assert abs(values.mean()) < 4 / math.sqrt(len(values))
    assert values.std() == pytest.approx(1.0, abs=4 / math.sqrt(2 * len(values)))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(len(values))
    assert (np.abs(values) > 3).mean() == pytest.approx(0.0027, rel=0.1)


def test_shares_of_the_fewest_make_the_whole_deviation_and_more_make_more():
    share = share_sigma(6.0, 9)
    assert share == 2.0
    assert math.sqrt(9 * share**2) == 6.0
    assert math.sqrt(16 * share**2) == 8.0
    with pytest.raises(ValueError, match="somebody must add noise"):
        share_sigma(1.0, 0)
