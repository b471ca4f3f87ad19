"""The noised mean: its sum, its noise and its denominator, worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedge.learning.messages import to_record
from fedge.noise import derived_key
from fedge_server.privacy.central import ClippedSum, Settings, next_clip_norm

REFERENCE = {"w": np.array([[1.0, 2.0]], np.float32), "b": np.array([3.0], np.float32)}
NEARLY_NONE = 1e-6  # noise multiplier


def update(w, b):
    return to_record({"w": np.array([w], np.float32), "b": np.array([b], np.float32)})


def noised_mean(updates, reference, settings, key):
    total = ClippedSum(reference, settings)
    for each in updates:
        total.add(each)
    return total.noised(key)


def mean_of(updates, settings, key=derived_key("k")):  # noqa: B008 - bytes
    return noised_mean(updates, REFERENCE, settings, key)


def test_changes_are_clipped_over_all_arrays_together_and_weigh_the_same():
    # Changes (3, 0 | 4): norm 5, cut to 1: (.6, 0 | .8). And (0, .5 | 0): short enough. Divided by 2.
    found = mean_of([update([4, 2], [7]), update([1, 2.5], [3])], Settings(1.0, NEARLY_NONE, 2)).mean
    np.testing.assert_allclose(found["w"], [[1 + 0.3, 2 + 0.25]], atol=1e-5)
    np.testing.assert_allclose(found["b"], [3 + 0.4], atol=1e-5)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}


def test_the_denominator_is_what_was_expected_whoever_is_missing():
    # One answer of ten: a tenth of its change, not the whole.
    found = mean_of([update([1, 2], [4])], Settings(1.0, NEARLY_NONE, 10)).mean
    np.testing.assert_allclose(found["b"], [3.1], atol=1e-5)


def spread(clients: int) -> float:
    """Deviation of the noise on a sum, when so many of 100 answer with no change at all."""
    reference = {"w": np.zeros(20_000, np.float64)}
    nothing = to_record({"w": np.zeros(20_000)})
    found = noised_mean([nothing] * clients, reference, Settings(2.0, 3.0, 100), derived_key(clients))
    return float(found.mean["w"].std()) * 100


@pytest.mark.parametrize("clients", [0, 40, 100])
def test_the_noise_on_the_sum_does_not_depend_on_the_replies(clients):
    """z S = 6, with all replies, with 60 % of them missing, and with none."""
    assert spread(clients) == pytest.approx(6.0, rel=0.02)


def test_one_client_moves_the_sum_by_the_clipping_norm_at_most():
    """Neighbours with the same noise: their difference is the client alone, exact to the last bit."""
    rng = np.random.default_rng(0)
    reference = {"w": np.zeros(1000, np.float64)}
    others = [to_record({"w": rng.normal(size=1000)}) for _ in range(5)]
    for size in (1e-3, 1.0, 1e6, 1e30):
        one = to_record({"w": rng.normal(size=1000) * size})
        with_it, without = (
            noised_mean(updates, reference, Settings(1.0, 1.0, 1), derived_key("same")).mean["w"]
            for updates in ([*others, one], others)
        )
        assert np.linalg.norm(with_it - without) <= 1.0
        assert (
            (with_it - without) * 2**20 % 1 == 0
        ).all()  # whole steps of the grid, of both and of nothing else


def test_order_and_number_of_the_others_leave_no_trace_in_the_last_bits():
    rng = np.random.default_rng(1)
    reference = {"w": np.zeros(100, np.float64)}
    updates = [to_record({"w": rng.normal(size=100)}) for _ in range(20)]
    one, other = (
        noised_mean(each, reference, Settings(1.0, 1.0, 20), derived_key("k")).mean["w"]
        for each in (updates, updates[::-1])
    )
    assert (one == other).all()


def test_the_count_is_paid_for_by_more_noise_on_the_changes():
    """Andrew et al. 2021, theorem 1: z = 1 and sigma_b = 1 give 1 / sqrt(1 - 1/4) = 1.1547."""
    settings = Settings(1.0, 1.0, 20, count_sigma=1.0)
    assert settings.change_multiplier == pytest.approx(1.1547, abs=1e-4)
    joint = 1 / settings.change_multiplier**2 + (0.5 / 1.0) ** 2
    assert math.sqrt(1 / joint) == pytest.approx(1.0)
    assert Settings(1.0, 1.0, 20).change_multiplier == 1.0
    with pytest.raises(ValueError, match=r"must be above 0\.5"):
        _ = Settings(1.0, 1.0, 10, count_sigma=0.5).change_multiplier


def test_the_share_of_the_unclipped_is_over_those_expected():
    # 3 of 4 answers within the norm, 10 expected: (3/2 - 1/2) / 10 + 1/2 = .6; the missing count as halves.
    near, far = update([1, 2], [3.5]), update([9, 9], [9])
    found = mean_of([near, near, near, far], Settings(1.0, 1e-4, 10, count_sigma=1e-3))
    assert found.unclipped == pytest.approx(0.6, abs=1e-3)
    assert mean_of([near], Settings(1.0, 1.0, 10)).unclipped is None


def test_the_clipping_norm_moves_towards_the_quantile():
    # All unclipped: exp(-.2 * .5) = .905; none: exp(.2 * .5) = 1.105; as wanted: stays.
    assert next_clip_norm(2.0, 1.0, quantile=0.5, learning_rate=0.2) == pytest.approx(2 * 0.9048, abs=1e-3)
    assert next_clip_norm(2.0, 0.0, quantile=0.5, learning_rate=0.2) == pytest.approx(2 * 1.1052, abs=1e-3)
    assert next_clip_norm(2.0, 0.5, quantile=0.5, learning_rate=0.2) == 2.0
