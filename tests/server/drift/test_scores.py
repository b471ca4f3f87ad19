"""Distances between histograms, by hand and by an independent formula."""

from __future__ import annotations

import numpy as np
import pytest

from fedge_server.drift.scores import Shapes, distances, feature_shifts
from fedge_server.drift.stability import index

LENGTH = 20


def shapes(inputs: list[list[float]], answers: list[float], confident: int = 19) -> Shapes:
    rows = np.zeros((len(inputs), 11))
    for row, values in zip(rows, inputs, strict=True):
        row[: len(values)] = values
    confidence = np.zeros(LENGTH)
    confidence[confident] = sum(answers)
    return Shapes(rows, confidence, np.array(answers, np.float64))


def test_answers_that_change_are_as_far_as_worked_by_hand() -> None:
    before, after = shapes([], [50, 50]), shapes([], [90, 10])
    p, q = 90.5 / 101, 0.5
    expected = 2 * (p - q) ** 2 / (2 * q * (1 - q) * (1 / 100 + 1 / 100))
    found = distances(after, before)
    assert found["answers"] == pytest.approx(expected)
    assert set(found) == {"confidence", "answers"}  # no reference, no inputs


def test_the_distance_of_features_is_that_of_cumulative_shares() -> None:
    before, after = shapes([[60, 40]], [50, 50]), shapes([[20, 80]], [50, 50])
    f = np.cumsum(np.array([20, 80, *[0] * 8]) + 0.5) / 105
    g = np.cumsum(np.array([60, 40, *[0] * 8]) + 0.5) / 105
    present = 100.5 / 101
    chance = (1 / 100 + 1 / 100) * ((g * (1 - g)).sum() + present * (1 - present))
    assert distances(after, before)["inputs"] == pytest.approx(((f - g) ** 2).sum() / chance)


def test_values_that_are_missing_more_often_are_a_change_too() -> None:
    before, after = shapes([[50, 50]], [50, 50]), shapes([[25, 25]], [50, 50])
    after.inputs[0, 10] = 50
    assert distances(after, before)["inputs"] > 10 * distances(before, before)["inputs"]
    assert distances(before, before)["inputs"] == 0


def test_samples_of_one_distribution_are_about_1_apart_whatever_their_number() -> None:
    draw = np.random.default_rng(0)
    for n, least in ((50, 0.6), (1000, 0.9)):  # the prior draws small ones together
        found = []
        for _ in range(300):
            one, two = (
                Shapes(draw.multinomial(n, [0.1] * 10 + [0.0], 3).astype(float), *(_rest(draw, n)))
                for _ in range(2)
            )
            found.append(distances(one, two))
        for name in ("inputs", "confidence", "answers"):
            assert least < np.mean([each[name] for each in found]) < 1.1


def _rest(draw: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    confidence = draw.multinomial(n, [1 / LENGTH] * LENGTH).astype(float)
    return confidence, draw.multinomial(n, [0.5, 0.3, 0.2]).astype(float)


def test_noise_below_0_gives_numbers_all_the_same() -> None:
    before = shapes([[60, 40]], [50, 50])
    noisy = Shapes(before.inputs - 80, before.confidence - 30, before.answers - 70)
    assert all(np.isfinite(value) for value in distances(noisy, before).values())
    assert np.isfinite(feature_shifts(noisy, before)).all()


def test_shifts_have_a_row_for_each_feature_confidence_and_answers() -> None:
    before, after = shapes([[60, 40], [1, 99]], [50, 50]), shapes([[20, 80], [1, 99]], [50, 50])
    found = feature_shifts(after, before)
    assert found.shape == (4, LENGTH)
    assert found[0, 0] == pytest.approx(-40 / 105.5, abs=0.01)
    assert (found[1:] == 0).all()


def test_the_stability_index_is_as_worked_by_hand() -> None:
    p, q = np.array([90.5, 10.5]) / 101, np.array([50.5, 50.5]) / 101
    expected = ((p - q) * np.log(p / q)).sum()
    assert index(np.array([[90.0, 10.0]]), np.array([[50.0, 50.0]]))[0] == pytest.approx(expected)
