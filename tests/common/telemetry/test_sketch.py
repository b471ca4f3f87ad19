"""Histograms: worked by hand, mergeable, and quantiles within what is promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.telemetry.sketch import (
    CELLS,
    LATENCY_BINS,
    Sketch,
    answers_of,
    binned,
    counted,
    latency_bin,
    latency_quantile,
    mean_confidence,
    padded,
)


def test_a_value_at_an_edge_belongs_to_the_bin_above_it() -> None:
    features = np.array([[0.9], [1.0], [2.5], [np.nan]])
    bins = binned(features, padded([np.array([1.0, 2.0])]))
    assert bins.ravel().tolist() == [0, 1, 2, CELLS - 1]
    assert counted(bins, CELLS).tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]]


def test_features_are_counted_apart() -> None:
    assert counted(np.array([[0, 1], [0, 2]]), 3).tolist() == [[2, 0, 0], [0, 1, 1]]


def test_answers_and_confidence_are_counted() -> None:
    answers, confidence = answers_of(np.array([[0.9, 0.1], [0.2, 0.8], [0.0, 1.0]]))
    assert answers.tolist() == [1, 2]
    assert np.flatnonzero(confidence).tolist() == [16, 18, 19]
    assert mean_confidence(confidence) == pytest.approx((0.825 + 0.925 + 0.975) / 3)


def test_classes_from_the_256th_on_share_a_bin() -> None:
    probabilities = np.eye(300)[[0, 254, 255, 299]]
    answers, _ = answers_of(probabilities)
    assert len(answers) == 256
    assert (answers[0], answers[254], answers[255]) == (1, 1, 2)


@given(st.lists(st.floats(1e-5, 100), min_size=1, max_size=50), st.floats(0, 1))
def test_a_quantile_of_latencies_is_within_nine_percent(seconds: list[float], q: float) -> None:
    counts = np.zeros(LATENCY_BINS, np.int64)
    for value in seconds:
        counts[latency_bin(value)] += 1
    exact = sorted(seconds)[max(math.ceil(q * len(seconds)), 1) - 1]
    found = latency_quantile(counts, q)
    assert found is not None
    assert abs(found - exact) <= 0.0906 * exact


def test_latencies_beyond_the_bins_count_at_their_ends() -> None:
    assert [latency_bin(value) for value in (0.0, -1.0, math.nan, 1e-9, 1e9)] == [
        0,
        0,
        0,
        0,
        LATENCY_BINS - 1,
    ]
    assert latency_quantile(np.zeros(LATENCY_BINS, np.int64), 0.5) is None


def test_the_sum_of_two_sketches_is_the_sketch_of_both() -> None:
    one, two = Sketch.empty(1, 2), Sketch.empty(1, 2)
    one.answers[:] = [1, 2]
    two.answers[:] = [3, 4]
    assert Sketch.sum([one, two]).answers.tolist() == [4, 6]
    with pytest.raises(ValueError, match="different sizes"):
        Sketch.sum([one, Sketch.empty(2, 2)])
    with pytest.raises(ValueError, match="nothing to add"):
        Sketch.sum([])


def test_nonsense_is_refused() -> None:
    good = Sketch.empty(1, 2)
    with pytest.raises(ValueError, match="confidence is int32"):
        Sketch(good.inputs, good.confidence.astype(np.int32), good.answers, good.latency, good.routes)
    with pytest.raises(ValueError, match="counts more"):
        Sketch(good.inputs, good.confidence, good.answers + 2**41, good.latency, good.routes)
    with pytest.raises(ValueError, match="inputs are"):
        Sketch(good.answers, good.confidence, good.answers, good.latency, good.routes)
