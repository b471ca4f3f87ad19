"""Norms of changes: measured by hand, bounded, and remembered from round to round."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.config import Config, Validate
from fedge.errors import ConfigError
from fedge_server.privacy.rules import check
from fedge_server.rounds.norms import ROW, norm_limit, squares
from fedge_server.rounds.record import RoundRecord


def test_the_sum_of_squares_is_of_the_difference():
    assert squares(np.float32([4, 1]), np.float32([1, 5])) == 25.0
    assert squares(np.float32([3, 4]), None) == 25.0
    assert squares(np.float32([]), None) == 0.0


@given(st.integers(0, 3 * ROW), st.sampled_from(["float16", "float32", "float64"]), st.integers(0, 9))
def test_it_is_that_of_float64_up_to_rounding(count, dtype, seed):
    rng = np.random.default_rng(seed)
    value, origin = (rng.normal(size=count).astype(dtype) for _ in range(2))
    wide = value.astype(np.float64) - origin.astype(np.float64)
    assert squares(value, origin) == pytest.approx(float(wide @ wide), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [5, ROW, 70_000])
@pytest.mark.parametrize("measured", [True, False])
def test_one_value_that_is_not_finite_shows(bad, count, measured):
    for at in (0, count // 2, count - 1):
        value = np.ones(count, np.float32)
        value[at] = bad
        with np.errstate(all="ignore"):
            assert not math.isfinite(squares(value, np.ones(count, np.float32) if measured else None))


def rounds(*norms: float | None, counted: bool = True) -> list[RoundRecord]:
    return [RoundRecord(i, {}, norm=norm, counted=counted) for i, norm in enumerate(norms)]


def test_the_relative_bound_follows_the_last_five_rounds_that_counted():
    validate = Validate(max_norm_ratio=3.0)
    assert norm_limit(validate, rounds(None)) == math.inf  # the first round has none
    assert norm_limit(validate, rounds(None, 2.0)) == 6.0
    # Of 100, 1, 2, 3, 4, 50 the last five: their median is 3.
    assert norm_limit(validate, rounds(None, 100, 1, 2, 3, 4, 50)) == 9.0
    spoilt = [*rounds(None, 2.0), *rounds(500.0, counted=False)]
    assert norm_limit(validate, spoilt) == 6.0


def test_of_two_bounds_the_tighter_one_holds():
    both = Validate(max_norm=5.0, max_norm_ratio=3.0)
    assert norm_limit(both, rounds(None)) == 5.0
    assert norm_limit(both, rounds(None, 1.0)) == 3.0
    assert norm_limit(both, rounds(None, 9.0)) == 5.0
    assert norm_limit(Validate(), rounds(None, 9.0)) == math.inf


def test_a_round_in_which_nobody_moved_bounds_nothing():
    assert norm_limit(Validate(max_norm_ratio=2.0), rounds(None, 0.0)) == math.inf


@pytest.mark.parametrize("validate", [{"max_norm": 1.0}, {"max_norm_ratio": 2.0}, {"max_examples": 10}])
def test_where_updates_are_masked_nothing_can_be_bounded(validate):
    config = Config.from_mapping(
        {"validate": validate, "privacy": {"secure_aggregation": True}, "model": {"standardise": False}}
    )
    with pytest.raises(ConfigError, match=r"\[validate\]: no norm and no number of examples is seen"):
        check(config, linear=True)


def test_where_the_server_adds_noise_only_a_fixed_bound_goes():
    central = {"privacy": {"mechanism": "central"}, "model": {"standardise": False}}
    with pytest.raises(ConfigError, match="max_norm_ratio = 2: follows the clients' norms"):
        check(Config.from_mapping({**central, "validate": {"max_norm_ratio": 2.0}}), linear=True)
    check(Config.from_mapping({**central, "validate": {"max_norm": 2.0}}), linear=True)
