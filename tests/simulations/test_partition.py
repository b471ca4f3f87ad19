"""Partitioners deal every example to exactly one client."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.config import Clients
from fedge.dataset import Dataset
from fedge.errors import ConfigError, DataError
from fedge.spec import Spec
from fedge_simulations.partition import deal, dirichlet, iid, shards


def dataset(n: int = 60, classes: int = 3, client=None, names=()) -> Dataset:
    labels = tuple(str(i) for i in range(classes))
    y = np.arange(n) % classes
    return Dataset(Spec("features", (1,), "float32", labels), np.zeros((n, 1), np.float32), y, client, names)


@given(
    kind=st.sampled_from(["iid", "dirichlet:0.5", "dirichlet:100", "shards:1", "shards:2"]),
    count=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_every_training_example_goes_to_exactly_one_client(kind, count, seed):
    data, train = dataset(), np.arange(5, 60)
    parts = deal(data, train, Clients(count=count, partition=kind), seed)
    assert len(parts) == count
    assert sorted(np.concatenate(parts)) == list(train)
    assert min(map(len, parts)) >= 1


def test_the_seed_decides():
    data, train = dataset(), np.arange(60)
    settings = Clients(count=4, partition="dirichlet:0.5")
    first, again, other = (deal(data, train, settings, seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(first, other, strict=True))


def test_iid_sizes_differ_by_one_at_most():
    assert sorted(map(len, iid(10, 3, np.random.default_rng(0)))) == [3, 3, 4]


def test_two_shards_per_client_hold_at_most_a_few_classes():
    y = np.repeat(np.arange(10), 60)  # McMahan's setting in small: 20 shards of 30, each of one class
    parts = shards(y, 10, 2, np.random.default_rng(0))
    assert all(len(part) == 60 for part in parts)
    assert all(len(np.unique(y[part])) <= 2 for part in parts)


def test_a_small_alpha_is_more_unequal_than_a_large_one():
    y = np.arange(2000) % 10

    def spread(alpha):
        counts = np.array(
            [np.bincount(y[p], minlength=10) for p in dirichlet(y, 10, alpha, np.random.default_rng(0))]
        )
        return (counts / counts.sum(1, keepdims=True)).std()

    assert spread(0.3) > 2 * spread(30.0)


def test_natural_clients_are_kept():
    client = np.array([0, 1, 1] * 20)
    parts = deal(dataset(client=client, names=("a", "b")), np.arange(60), Clients(partition="natural"), 0)
    assert [len(part) for part in parts] == [20, 40]


def test_a_natural_client_without_training_data_is_named():
    client = np.array([0, 1, 1] * 20)
    train = np.flatnonzero(client == 1)
    with pytest.raises(DataError, match="client 'a' has no training example"):
        deal(dataset(client=client, names=("a", "b")), train, Clients(partition="natural"), 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Clients(count=61), "more clients than the 60 training examples"),
        (Clients(count=40, partition="shards:2"), "80 shards for 60 examples"),
        (Clients(count=30, partition="dirichlet:0.01"), "leaves a client without data"),
        (Clients(partition="natural"), "names no clients"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_the_reason(settings, says):
    with pytest.raises(ConfigError, match=says):
        deal(dataset(), np.arange(60), settings, 0)


def test_a_count_that_contradicts_the_natural_clients_is_refused():
    data = dataset(client=np.array([0, 1, 1] * 20), names=("a", "b"))
    with pytest.raises(ConfigError, match="the data has 2 natural clients"):
        deal(data, np.arange(60), Clients(count=3, partition="natural"), 0)
