"""The mean that is formed as updates come: its numbers, its bound, and what it leaves alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from fedge.config import Config
from fedge.errors import ConfigError
from fedge.learning.messages import to_record
from fedge.wire.arrays import PIECE_BYTES, FileArray
from fedge_server import strategies
from fedge_server.strategies.mean import Mean

NORMAL = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
WEIGHTS = st.integers(1, 10**9)


def mean_of(values, weights, accumulate="float32"):
    mean = Mean(accumulate)
    for value, weight in zip(values, weights, strict=True):
        mean.add(to_record({"w": np.asarray(value)}), weight)
    return mean.result()["w"].numpy()


def test_weights_are_relative():
    # (1 * 2 + 3 * 6) / 4 = 5; (1 * 4 + 3 * 0) / 4 = 1
    assert mean_of(np.float32([[2, 4], [6, 0]]), [1, 3]).tolist() == [5.0, 1.0]
    assert mean_of(np.float32([[2, 4], [6, 0]]), [10, 30]).tolist() == [5.0, 1.0]


def bound(values, weights, unit):
    """Of the distance between a computed mean and the exact one, as `strategies/mean.py` states it."""
    k = len(values)
    g = (k + 4) * unit / (1 - (k + 4) * unit)
    absolute = sum(n * abs(Fraction(v)) for n, v in zip(weights, values, strict=True)) / sum(weights)
    return Fraction(g) * absolute + k * Fraction(2) ** -149


@pytest.mark.slow
@given(st.lists(st.tuples(NORMAL, WEIGHTS), min_size=1, max_size=40), st.randoms())
@example([(1e6, 1), (-1e6, 1), (1e-3, 10**9)], None)
def test_in_any_order_the_mean_is_within_the_stated_bound_of_the_exact_one(pairs, draw):
    exact = sum(n * Fraction(v) for v, n in pairs) / sum(n for _, n in pairs)
    for accumulate, unit in (("float32", 2.0**-24), ("float64", 2.0**-53)):
        for _ in range(2):
            if draw is not None:
                draw.shuffle(pairs)
            values, weights = [v for v, _ in pairs], [n for _, n in pairs]
            found = mean_of(np.float32(values).reshape(-1, 1), weights, accumulate)[0]
            rounding = abs(exact) * Fraction(2) ** -24 if accumulate == "float64" else 0  # back to float32
            assert abs(Fraction(float(found)) - exact) <= bound(values, weights, unit) + rounding


def test_float64_sums_of_two_orders_are_the_same_to_the_bit_where_float32_sums_are_not():
    rng = np.random.default_rng(1)
    values, weights = rng.normal(size=(50, 1000)).astype(np.float32), rng.integers(1, 1000, 50).tolist()
    for accumulate, same in (("float32", False), ("float64", True)):
        forth, back = mean_of(values, weights, accumulate), mean_of(values[::-1], weights[::-1], accumulate)
        assert forth.dtype == np.float32
        assert (forth.tobytes() == back.tobytes()) is same


@pytest.mark.parametrize(
    ("dtype", "given_back"),
    [("float16", "float16"), ("float64", "float64"), ("int64", "float64"), ("bool", "float64")],
)
def test_every_dtype_has_its_mean(dtype, given_back):
    found = mean_of(np.array([[1, 0], [1, 1]]).astype(dtype), [1, 3])
    assert (found.tolist(), found.dtype) == ([1.0, 0.75], np.dtype(given_back))


def test_values_beyond_float16_do_not_overflow_on_their_way():
    assert mean_of(np.full((3, 1), 60_000, np.float16), [1000, 1000, 1000]).tolist() == [60_000.0]


@pytest.mark.slow
def test_updates_are_only_read_and_come_in_any_form(tmp_path):
    rng = np.random.default_rng(2)
    value = rng.normal(size=(3, PIECE_BYTES // 4)).astype(np.float32)  # three pieces of a file
    (tmp_path / "w").write_bytes(value.tobytes())
    forms = [
        to_record({"w": value}),
        ArrayRecord({"w": Array(np.asfortranarray(value))}),
        ArrayRecord({"w": Array(value)}),
        to_record({"w": value.copy()}, shared=False),
        ArrayRecord(),
    ]
    forms[-1]["w"] = FileArray(tmp_path / "w", 0, "float32", value.shape)
    mean = Mean()
    for form in forms:
        mean.add(form, 7)
    np.testing.assert_allclose(mean.result()["w"].numpy(), value, rtol=1e-6)
    for form in forms:
        assert form["w"].numpy().tobytes() == value.tobytes()


def test_of_nothing_there_is_no_mean():
    assert list(Mean().result()) == []


def strategy(**options):
    return strategies.build(Config.from_mapping({"strategy": options}), network=nn.Linear(2, 2)).strategy


@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedsgd"]
)
def test_every_averaging_strategy_takes_its_precision_from_the_configuration(name):
    assert strategy(name=name).accumulate == "float32"
    assert strategy(name=name, accumulate="float64").accumulate == "float64"


def test_another_precision_is_refused_and_so_is_any_where_nothing_is_accumulated():
    with pytest.raises(ConfigError, match=r"strategy\.accumulate = 'float46': did you mean 'float64'\?"):
        strategy(name="fedavg", accumulate="float46")
    with pytest.raises(ConfigError, match=r"unknown key 'strategy\.accumulate' for strategy 'fedmedian'"):
        strategy(name="fedmedian", accumulate="float64")


def test_arrays_of_any_length_are_added_whole():
    """The pieces that BLAS is given have an end of their own."""
    for size in (1, 9_983, 9_984, 9_985, 30_000, 70_001):
        values = np.stack([np.arange(size), np.arange(size)[::-1]]).astype(np.float32)
        for dtype in ("float32", "float64", "float16"):
            given = (values % 8).astype(dtype)
            np.testing.assert_allclose(mean_of(given, [1, 3]), (given[0] + 3.0 * given[1]) / 4, rtol=1e-3)
