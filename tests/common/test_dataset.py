from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.dataset import Dataset, Examples, Split, latest, split, stratified
from fedge.errors import DataError
from fedge.spec import Spec

LABELS = ("no", "yes", "maybe")
TABLE = Spec("features", (2,), "float32", LABELS)
IMAGES = Spec("image", (2, 2), "float32", LABELS)


def dataset(n: int = 60, **changes: Any) -> Dataset:
    values: dict[str, Any] = {
        "spec": TABLE,
        "x": np.arange(2 * n, dtype=np.float32).reshape(n, 2),
        "y": np.arange(n, dtype=np.int64) % 3,
    }
    return Dataset(**{**values, **changes})


def cut(data: Dataset, **changes: Any) -> Split:
    return split(data, **{"holdout": 0.2, "gate": 0.5, "proxy": 0.1, "seed": 0, **changes})


def parts_of(found: Split) -> list[list[int]]:
    return [part.tolist() for part in (found.train, found.proxy, found.test, found.gate)]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"x": np.zeros((0, 2), np.float32), "y": np.zeros(0, np.int64)}, "no example"),
        ({"x": np.zeros((60, 3), np.float32)}, r"x is float32 \(60, 3\); it must be float32 \(N, \*\(2,\)\)"),
        ({"x": np.zeros((60, 2))}, "x is float64"),
        ({"x": np.zeros((60, 2), ">f4")}, "x is >f4"),
        ({"y": np.zeros(59, np.int64)}, r"y has shape \(59,\), but x holds 60 examples"),
        ({"y": np.zeros((60, 1), np.int64)}, r"y has shape \(60, 1\)"),
        ({"y": np.zeros(60, np.int32)}, "y is int32; a reader must return int64"),
        ({"y": np.full(60, 3)}, r"label 3 is out of range 0 \.\. 2"),
        ({"y": np.full(60, -1)}, "label -1 is out of range"),
        ({"client": np.zeros(59, np.int64), "clients": ("a",)}, "client has shape"),
        ({"client": np.ones(60, np.int64), "clients": ("a",)}, r"client holds 1 \.\. 1, but 1 clients"),
        ({"client": np.full(60, -1), "clients": ("a",)}, r"client holds -1"),
        ({"client": np.full(60, -2), "clients": ("a",)}, r"client holds -2"),
        ({"test": np.zeros(60, np.int64)}, "split is int64; a reader must return bool"),
    ],
)
def test_a_reader_that_returns_nonsense_is_told_what(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError, match=line):
        dataset(**changes)


def test_an_infinite_value_is_named_with_its_place_and_column() -> None:
    x = np.zeros((60, 2), np.float32)
    x[7, 1] = np.inf
    with pytest.raises(DataError, match=r"x\[7, 1\] is inf; infinite values"):
        dataset(x=x)
    named = Spec("features", (2,), "float32", LABELS, ("age", "dose"))
    with pytest.raises(DataError, match=r"x\[7, 1\] \(column 'dose'\) is inf"):
        dataset(x=x, spec=named)


def test_nan_is_a_missing_value_in_a_table_and_an_error_in_an_image() -> None:
    assert len(dataset(x=np.full((60, 2), np.nan, np.float32))) == 60
    with pytest.raises(DataError, match=r"x\[0, 0, 0\] is nan; an image"):
        dataset(spec=IMAGES, x=np.full((60, 2, 2), np.nan, np.float32))


def test_examples_are_taken_by_position() -> None:
    taken = dataset().examples.take(np.array([3, 1]))
    assert isinstance(taken, Examples)
    assert (taken.x.tolist(), taken.y.tolist(), len(taken)) == ([[6, 7], [2, 3]], [0, 1], 2)


def test_labels_take_the_order_of_the_run() -> None:
    wider = dataset(6).with_labels(("maybe", "never", "no", "yes"))
    assert (wider.spec.labels, wider.y.tolist()) == (("maybe", "never", "no", "yes"), [2, 3, 0, 2, 3, 0])


def test_a_label_that_the_run_does_not_know_is_refused_only_if_it_occurs() -> None:
    with pytest.raises(DataError, match="label 'maybe' is not among the run's labels"):
        dataset().with_labels(("no", "yes"))
    without = dataset(y=np.arange(60, dtype=np.int64) % 2)
    assert without.with_labels(("yes", "no")).y[:2].tolist() == [1, 0]
    with pytest.raises(DataError, match="1 labels"):
        dataset(y=np.zeros(60, np.int64)).with_labels(("no",))


def test_sixty_examples_are_cut_as_worked_out_by_hand() -> None:
    # 20 of each class. Hold-out: 4 of each, half to the gate. Of the 16 left: round(1.6) = 2 to the proxy.
    found = cut(dataset())
    y = dataset().y
    for part, each in ((found.gate, 2), (found.test, 2), (found.proxy, 2), (found.train, 14)):
        assert np.bincount(y[part]).tolist() == [each] * 3


@given(
    st.integers(60, 120),
    st.floats(0.2, 0.5),
    st.floats(0.3, 0.7),
    st.floats(0, 0.5),
    st.integers(0, 9),
    st.booleans(),
)
def test_no_example_serves_two_purposes_and_none_is_lost(
    n: int, holdout: float, gate: float, proxy: float, seed: int, natural: bool
) -> None:
    clients = {"client": np.arange(n, dtype=np.int64) % 4, "clients": tuple("abcd")} if natural else {}
    found = parts_of(cut(dataset(n, **clients), holdout=holdout, gate=gate, proxy=proxy, seed=seed))
    assert sorted(i for part in found for i in part) == list(range(n))
    assert all(part == sorted(part) for part in found)


def test_the_seed_decides_and_nothing_else() -> None:
    assert parts_of(cut(dataset(), seed=1)) == parts_of(cut(dataset(), seed=1))
    assert parts_of(cut(dataset(), seed=1)) != parts_of(cut(dataset(), seed=2))


def test_a_split_of_the_file_is_the_holdout_whatever_the_fraction_says() -> None:
    test = np.arange(60) >= 48
    found = cut(dataset(test=test), holdout=0.9)
    assert sorted([*found.test, *found.gate]) == list(range(48, 60))


def test_natural_clients_with_few_examples_are_held_out_from_like_all_others() -> None:
    # 300 clients of one example per class: rounding 20 % of each by itself would hold out nothing.
    client = np.repeat(np.arange(300, dtype=np.int64), 3)
    data = dataset(900, client=client, clients=tuple(map(str, range(300))))
    found = cut(data, proxy=0.0)
    held = np.concatenate([found.test, found.gate])
    assert np.bincount(data.y[held]).tolist() == [60, 60, 60]
    assert set(client[found.train]) == set(range(300))


def test_a_client_with_a_single_example_keeps_it() -> None:
    client = np.minimum(np.arange(60, dtype=np.int64), 20)  # twenty clients of one example, one of forty
    data = dataset(client=client, clients=tuple(map(str, range(21))))
    for seed in range(20):
        assert set(client[cut(data, seed=seed, proxy=0.3).train]) == set(range(21))


def test_a_large_natural_client_gives_its_own_share() -> None:
    client = (np.arange(600) >= 450).astype(np.int64)
    found = cut(dataset(600, client=client, clients=("big", "small")), proxy=0.0)
    held = np.concatenate([found.test, found.gate])
    assert np.bincount(client[held]).tolist() == [90, 30]


def test_stratified_draws_the_nearest_whole_number_of_each_group() -> None:
    groups = np.array([0] * 10 + [1] * 3 + [2], dtype=np.int64)
    drawn, left = stratified(groups, 0.3, np.random.default_rng(0))
    assert np.bincount(groups[drawn], minlength=3).tolist() == [3, 1, 0]
    assert sorted([*drawn, *left]) == list(range(14))


@pytest.mark.parametrize(
    ("changes", "settings", "purpose"),
    [
        ({"test": np.ones(60, bool)}, {}, "train"),
        ({"test": np.zeros(60, bool)}, {}, "test"),
        ({}, {"holdout": 0.001}, "test"),
        ({}, {"gate": 1.0}, "test"),
        ({}, {"gate": 0.01}, "gate"),
    ],
)
def test_a_split_that_leaves_nothing_for_a_purpose_is_refused(
    changes: dict[str, Any], settings: dict[str, float], purpose: str
) -> None:
    with pytest.raises(DataError, match=f"60 examples leave none for {purpose}; bring more data"):
        cut(dataset(**changes), **settings)


def test_the_latest_of_each_client_are_drawn_and_what_overlaps_them_is_left_out() -> None:
    client = np.array([0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 2])
    drawn, left = latest(client, 0.2, 1)
    assert drawn.tolist() == [7, 10, 11]  # 1 of the 3 that client 1 has, 2 of 9, and of a single one none
    assert left.tolist() == [0, 1, 2, 3, 5, 6, 8, 12]  # without 4 and 9
    assert latest(client, 0.0, 1)[1].tolist() == list(range(13))
    assert latest(np.zeros(4, np.int64), 0.5, 2)[0].tolist() == []  # nothing would be left to train with
    assert latest(np.zeros(5, np.int64), 0.4, 2)[1].tolist() == [0]


def test_windows_that_overlap_are_split_by_time_and_not_by_chance() -> None:
    found = cut(dataset(overlap=1), proxy=0.0)
    assert parts_of(found) == [list(range(47)), [], list(range(48, 53)), list(range(54, 60))]
    own = cut(dataset(overlap=1, test=np.arange(60) < 20), proxy=0.0)
    assert (own.train.tolist(), own.test.tolist()) == (list(range(20, 60)), list(range(9)))


def test_a_row_of_nobody_serves_no_purpose() -> None:
    client = np.where(np.arange(60) % 4 == 0, -1, 0)
    data = dataset(client=client, clients=("a",))
    used = np.sort(np.concatenate([np.array(part) for part in parts_of(cut(data))]))
    assert used.tolist() == data.usable.tolist() == [i for i in range(60) if i % 4]
    assert len(data.used_examples) == 45
