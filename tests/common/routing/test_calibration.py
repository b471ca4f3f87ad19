"""Thresholds against the exact binomial law, and their promise against draws from a known law."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import DataError
from fedge.routing import for_accuracy, for_gap, for_share
from fedge.routing.calibration import most_losses


def tail(n: int, p: Fraction, k: int) -> Fraction:
    """P(Binomial(n, p) <= k), exactly."""
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


@given(st.integers(1, 60), st.integers(1, 19), st.sampled_from([0.01, 0.05, 0.2]))
def test_as_many_losses_as_the_exact_binomial_tail_allows(n: int, twentieths: int, level: float) -> None:
    p = Fraction(twentieths, 20)
    k = most_losses(n, float(p), level)
    assert k == -1 or float(tail(n, p, k)) <= level * (1 + 1e-9)
    assert k == n or float(tail(n, p, k + 1)) > level * (1 - 1e-9)


def test_the_rule_of_three() -> None:
    """No loss in 299 examples shows less than 1 % at 95 %; in 298 it does not (0.99^298 = 0.05002)."""
    assert (most_losses(299, 0.01, 0.05), most_losses(298, 0.01, 0.05)) == (0, -1)


def test_a_share_is_the_largest_that_the_examples_show() -> None:
    doubts = (np.arange(1000) + 0.5) / 1000
    found = for_share(doubts, 0.2)
    assert int(found.sent * 1000) <= most_losses(1000, 0.2, 0.05) == 178
    assert 0.17 < found.sent <= 0.178
    assert (found.limit, found.examples, found.rule.doubt) == (0.2, 1000, "confidence")
    assert found.sent == (doubts > found.rule.threshold).mean()


def test_a_gap_counts_what_the_device_keeps_and_gets_wrong_where_the_cloud_is_right() -> None:
    n = 10_000
    doubts = (np.arange(n) + 0.5) / n
    device, cloud = np.ones(n, bool), np.ones(n, bool)
    device[8000:] = False  # the doubtful fifth is wrong
    cloud[9500:] = False  # of which the cloud gets a quarter wrong too
    found = for_gap(doubts, device, cloud, 0.01)
    kept_wrong = (~device & cloud & (doubts <= found.rule.threshold)).sum()
    assert kept_wrong == round(found.seen * n) <= most_losses(n, 0.01, 0.05) == 83
    assert 0.191 < found.sent < 0.2


def test_an_accuracy_counts_every_wrong_answer() -> None:
    n = 10_000
    doubts = (np.arange(n) + 0.5) / n
    device, cloud = np.ones(n, bool), np.ones(n, bool)
    device[8000:] = False
    cloud[9900:] = False
    found = for_accuracy(doubts, device, cloud, 0.97)
    assert found.seen * n <= most_losses(n, 0.03, 0.05) == 271
    assert 0.18 < found.sent < 0.1832  # 171 more of them may be wrong
    with pytest.raises(DataError, match="do not show accuracy"):
        for_accuracy(doubts, device, cloud, 0.995)


@pytest.mark.parametrize("share", [0.0, 1.0, math.nan])
def test_what_cannot_be_promised_is_refused(share: float) -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        for_share(np.zeros(10), share)


def test_too_few_examples_promise_nothing() -> None:
    with pytest.raises(DataError, match="10 examples do not show"):
        for_share(np.linspace(0, 1, 10), 0.05)
    with pytest.raises(DataError, match="one doubt"):
        for_gap(np.zeros(3), np.ones(2, bool), np.ones(3, bool), 0.1)
    with pytest.raises(DataError, match="NaN"):
        for_share(np.array([math.nan]), 0.1)


@pytest.mark.slow
def test_the_promises_are_broken_no_more_often_than_stated() -> None:
    """200 calibrations on 400 examples of a known law each; at 80 % a fifth may break the promise."""
    rng = np.random.default_rng(0)
    broken = {"share": 0, "gap": 0}
    times = 200
    for _ in range(times):
        doubts = rng.random(400)  # P(sent) = 1 - threshold
        device = rng.random(400) > doubts / 2  # wrong with half the doubt
        cloud = np.ones(400, bool)  # always right: E[lost and kept] = threshold^2 / 4
        share = for_share(doubts, 0.3, confidence=0.8).rule.threshold
        broken["share"] += 1 - share > 0.3
        gap = for_gap(doubts, device, cloud, 0.1, confidence=0.8).rule.threshold
        broken["gap"] += gap**2 / 4 > 0.1
    slack = 3 * math.sqrt(times * 0.2 * 0.8)
    assert 0 < broken["share"] < 0.2 * times + slack
    assert 0 < broken["gap"] < 0.2 * times + slack
