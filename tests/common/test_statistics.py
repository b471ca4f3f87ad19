from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedge.errors import FormatError
from fedge.spec import Spec
from fedge.statistics import Moments

TABLE = Spec("features", (3,), "float32", ("a", "b"))
GREY = Spec("image", (2, 2), "uint8", ("a", "b"))
COLOUR = Spec("image", (1, 2, 3), "uint8", ("a", "b"))

rows = arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.just(3)),
    elements=st.floats(-1e6, 1e6, width=32) | st.just(float("nan")),
)


def table(columns: list[list[float]]) -> npt.NDArray[np.float32]:
    return np.array(columns, np.float32).T


def test_moments_of_a_table_are_counts_sums_and_sums_of_squares_without_what_is_missing() -> None:
    found = Moments.of(table([[1, 2, 3], [4, np.nan, 6], [np.nan, np.nan, np.nan]]), TABLE)
    assert found.count.tolist() == [3, 2, 0]
    assert found.total.tolist() == [6, 10, 0]
    assert found.squares.tolist() == [14, 52, 0]
    assert found.mean.tolist() == [2, 5, 0]
    assert found.std == pytest.approx([np.sqrt(2 / 3), 1, 1])  # a column that is all missing: 1


def test_moments_of_images_are_per_channel_over_all_pixels() -> None:
    grey = Moments.of(np.array([[[0, 2], [4, 6]]], np.uint8), GREY)
    assert (grey.count.tolist(), grey.total.tolist(), grey.squares.tolist()) == ([4], [12], [56])
    colour = Moments.of(np.array([[[[1, 10, 100], [3, 30, 200]]]], np.uint8), COLOUR)
    assert (colour.count.tolist(), colour.mean.tolist()) == ([2, 2, 2], [2, 20, 150])


def test_a_byte_does_not_overflow_when_it_is_squared() -> None:
    assert Moments.of(np.full((1, 2, 2), 255, np.uint8), GREY).squares.tolist() == [4 * 255**2]


@given(rows, rows, rows)
def test_moments_of_parts_add_up_to_those_of_the_pooled_data(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], c: npt.NDArray[np.float32]
) -> None:
    added = Moments.sum([Moments.of(part, TABLE) for part in (a, b, c)])
    pooled = Moments.of(np.concatenate([a, b, c]), TABLE)
    assert added.count.tolist() == pooled.count.tolist()
    assert added.total == pytest.approx(pooled.total, rel=1e-12, abs=1e-6)
    assert added.squares == pytest.approx(pooled.squares, rel=1e-12, abs=1e-6)


@given(rows)
def test_mean_and_deviation_are_those_that_numpy_gives(x: npt.NDArray[np.float32]) -> None:
    found = Moments.of(x, TABLE)
    for column, mean, std in zip(x.T.astype(np.float64), found.mean, found.std, strict=True):
        present = column[~np.isnan(column)]
        if len(present):
            assert mean == pytest.approx(present.mean(), rel=1e-9, abs=1e-9)
        expected = present.std() if len(present) else 0.0
        if expected > 1e-5 * (abs(mean) + 1):
            assert std == pytest.approx(expected, rel=1e-3)
        assert std > 0


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e-6, 123456.78, 1.7e9, 1e30])
@pytest.mark.parametrize("n", [1, 7, 200_000])
def test_a_constant_column_has_deviation_one_however_many_rows_it_has(value: float, n: int) -> None:
    spec = Spec("features", (1,), "float32", ("a", "b"))
    part = Moments.of(np.full((n, 1), value, np.float32), spec)
    assert part.std.tolist() == [1.0]
    assert Moments.sum([part] * 1000).std.tolist() == [1.0]


def test_a_column_far_from_zero_keeps_its_deviation() -> None:
    spec = Spec("features", (1,), "float32", ("a", "b"))
    seconds = np.float32(1.7e9) + np.arange(0, 86_400, 128, dtype=np.float32)[:, None]
    assert Moments.of(seconds, spec).std == pytest.approx([seconds.astype(np.float64).std()], rel=1e-3)


def test_any_memory_layout_gives_the_same_moments() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    expected = Moments.of(x, TABLE)
    for other in (np.asfortranarray(x), x[::-1][::-1], np.broadcast_to(x, x.shape)):
        assert Moments.of(other, TABLE).total.tolist() == expected.total.tolist()


def test_the_input_is_left_as_it_is() -> None:
    x = np.array([[1, np.nan, 3]], np.float64)
    x.flags.writeable = False
    Moments.of(x, TABLE)
    assert np.isnan(x[0, 1])


def test_nothing_or_unequal_widths_cannot_be_added() -> None:
    one = Moments.of(np.zeros((1, 3), np.float32), TABLE)
    with pytest.raises(FormatError, match="nothing to add"):
        Moments.sum([])
    with pytest.raises(FormatError, match="different widths"):
        Moments.sum([one, Moments.of(np.zeros((1, 2, 2), np.uint8), GREY)])
