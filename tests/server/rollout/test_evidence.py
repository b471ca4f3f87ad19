"""The rule that halts: numbers by hand, its exact chances, and its false halts by simulation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import UserError
from fedge_server.rollout.evidence import (
    Criterion,
    Tally,
    chance_of_halt,
    devices_to_halt,
    halts,
    log_ratio,
)

INSTALL = Criterion("install", 0.02, 0.10)


@pytest.mark.parametrize(
    ("bad", "judged", "ratio"),
    [
        (0, 0, 1),
        (1, 1, 5),
        (2, 2, 25),
        (3, 3, 125),
        (3, 5, 125 * (0.9 / 0.98) ** 2),
        (0, 10, (0.9 / 0.98) ** 10),
    ],
)
def test_the_ratio_is_walds(bad: int, judged: int, ratio: float) -> None:
    assert math.exp(log_ratio(INSTALL, Tally(judged, bad))) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("bad", "judged", "stops"),
    [(2, 2, False), (3, 3, True), (3, 5, True), (3, 6, False), (4, 25, True), (4, 26, False)],
)
def test_three_of_five_bad_halt_at_one_in_a_hundred_and_three_of_six_do_not(
    bad: int, judged: int, stops: bool
) -> None:
    """125 x .9184^2 = 105.4, once more 96.8; 625 x .9184^21 = 104.6, once more 96.0; it takes 100."""
    assert halts(INSTALL, Tally(judged, bad), 0.01) is stops


def test_a_criterion_does_not_judge_before_its_number_of_devices() -> None:
    patient = Criterion("install", 0.02, 0.10, at_least=10)
    assert not halts(patient, Tally(9, 9), 0.01)
    assert halts(patient, Tally(10, 9), 0.01)
    assert (devices_to_halt(INSTALL, 0.01), devices_to_halt(patient, 0.01)) == (3, 10)


def test_the_exact_chance_is_that_of_coin_tosses() -> None:
    """Of five devices it takes three: 16 of 32 outcomes, if one in two is bad."""
    assert chance_of_halt(INSTALL, 0.01, 0.5, 5) == pytest.approx(0.5)
    assert chance_of_halt(INSTALL, 0.01, 0.5, 2) == 0
    assert chance_of_halt(INSTALL, 0.01, 1.0, 3) == 1
    assert chance_of_halt(INSTALL, 0.01, 0.0, 1000) == 0


def simulated(criterion: Criterion, level: float, rate: float, devices: int, times: int = 4000) -> float:
    """Share of simulated releases that are halted, by another road than `chance_of_halt`."""
    bad: npt.NDArray[np.int64] = np.cumsum(np.random.default_rng(0).random((times, devices)) < rate, axis=1)
    good = np.arange(1, devices + 1) - bad
    p, q = criterion.tolerated, criterion.unacceptable
    ratio = bad * np.log(q / p) + good * np.log((1 - q) / (1 - p))
    return float((ratio >= -np.log(level)).any(axis=1).mean())


@pytest.mark.parametrize(("rate", "devices"), [(0.02, 400), (0.07, 50), (0.07, 250), (0.07, 400), (0.2, 50)])
def test_the_exact_chance_is_what_simulation_finds(rate: float, devices: int) -> None:
    exact = chance_of_halt(INSTALL, 0.01, rate, devices)
    found = simulated(INSTALL, 0.01, rate, devices)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000) + 1e-3)


@pytest.mark.parametrize("level", [0.05, 0.01])
@pytest.mark.parametrize("rate", [0.02, 0.01])
def test_a_release_as_bad_as_tolerated_is_halted_no_more_often_than_stated(level: float, rate: float) -> None:
    """In a thousand looks; a fixed-size test that looks as often would halt several times as many."""
    assert simulated(INSTALL, level, rate, 1000) <= level
    assert chance_of_halt(INSTALL, level, rate, 300) <= level


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 20))
def test_one_more_bad_device_never_takes_a_conviction_back(good: int, bad: int, more: int) -> None:
    tally, worse = Tally(good + bad, bad), Tally(good + bad + more, bad + more)
    assert halts(INSTALL, worse, 0.01) or not halts(INSTALL, tally, 0.01)
    assert log_ratio(INSTALL, Tally(good + bad, bad)) >= log_ratio(INSTALL, Tally(good + bad + more, bad))


def test_a_device_is_worse_by_its_own_confidence_before_or_its_tiers_budget() -> None:
    confidence, latency = (
        Criterion("confidence", 0.1, 0.4, limit=0.1),
        Criterion("latency", 0.1, 0.4, limit=50),
    )
    assert confidence.is_bad(0.7, 0.9) is True
    assert confidence.is_bad(0.85, 0.9) is False
    assert confidence.is_bad(0.2, None) is None
    assert (latency.is_bad(50.0), latency.is_bad(50.1)) == (False, True)


@pytest.mark.parametrize(
    ("kind", "tolerated", "unacceptable", "at_least", "limit", "why"),
    [
        ("intsall", 0.1, 0.2, 1, None, "criteria: install, health"),
        ("install", 0.2, 0.2, 1, None, "the first below the second"),
        ("install", 0.0, 0.2, 1, None, "must be above 0"),
        ("install", 0.1, 1.0, 1, None, "below 1"),
        ("install", 0.1, float("nan"), 1, None, "must be above 0"),
        ("install", 0.1, 0.2, 0, None, "at_least = 0"),
        ("install", 0.1, 0.2, 1, 5.0, "takes no limit"),
        ("latency", 0.1, 0.2, 1, None, "needs max_ms"),
        ("confidence", 0.1, 0.2, 1, -0.1, "max_drop = -0.1"),
    ],
)
def test_a_criterion_that_makes_no_sense_is_refused(
    kind: str, tolerated: float, unacceptable: float, at_least: int, limit: float | None, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        Criterion(kind, tolerated, unacceptable, at_least, limit)


def test_a_tally_holds_no_more_bad_devices_than_it_judged() -> None:
    with pytest.raises(ValueError, match="3 bad of 2"):
        Tally(2, 3)
    assert Tally(5, 2) - Tally(3, 2) == Tally(2, 0)
    assert Tally(5, 3) - Tally(5, 2) == Tally(0, 0)  # a verdict that turned after an override
